"""The SQL of the store's larger statements. Knows the tables of database.py; rows.py knows what the columns mean."""

from cluster.batch.records import ENDED, BatchStatus

# Statuses of batches that have not ended.
RUNNING: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")
RUNNING_MARKS = ", ".join("?" for _ in RUNNING)
LINE_COLUMNS = "l.number, l.custom_id, l.start, l.num_bytes, l.group_key, l.num_tokens, l.crashes, l.lone_crashes"
PLAN = """
SELECT l.number FROM lines l JOIN (
    SELECT group_key, MAX(length_class) AS longest, SUM(num_tokens) AS work FROM lines WHERE batch = ? GROUP BY group_key
) g ON g.group_key = l.group_key WHERE l.batch = ?
ORDER BY g.longest DESC, g.work DESC, l.group_key, l.num_tokens DESC, l.number
"""
DUPLICATES = f"""
SELECT {LINE_COLUMNS} FROM lines l JOIN (
    SELECT custom_id, MIN(number) AS first FROM lines WHERE batch = ? GROUP BY custom_id HAVING COUNT(*) > 1
) d ON d.custom_id = l.custom_id WHERE l.batch = ? AND l.number > d.first ORDER BY l.number LIMIT ?
"""
PENDING = f"""
SELECT {LINE_COLUMNS}, o.position FROM line_order o JOIN lines l ON l.batch = o.batch AND l.number = o.number
WHERE o.batch = ? AND o.position > ? AND l.crashes = 0
AND NOT EXISTS (SELECT 1 FROM results r WHERE r.batch = o.batch AND r.number = o.number)
ORDER BY o.position LIMIT ?
"""
SUSPECTS = f"""
SELECT {LINE_COLUMNS} FROM lines l WHERE l.batch = ? AND l.crashes > 0
AND NOT EXISTS (SELECT 1 FROM results r WHERE r.batch = l.batch AND r.number = l.number)
ORDER BY l.number
"""
ANSWERED = f"""
SELECT {LINE_COLUMNS}, r.status_code, r.request_id, r.error_code, r.error_message,
r.num_prompt_tokens, r.num_cached_tokens, r.num_output_tokens, r.body
FROM lines l LEFT JOIN results r ON r.batch = l.batch AND r.number = l.number
WHERE l.batch = ? AND l.number > ? ORDER BY l.number LIMIT ?
"""
INSERT_LINE = "INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_RESULT = "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
EXPIRED_FILES = f"""
SELECT record FROM files f WHERE expires_at <= ? AND NOT EXISTS (
    SELECT 1 FROM batches b WHERE b.input_file_id = f.id AND b.status IN ({RUNNING_MARKS})
) ORDER BY seq LIMIT ?
"""
ENDED_WITH_LINES = f"""
SELECT id FROM batches b WHERE status IN ({", ".join("?" for _ in ENDED)})
AND EXISTS (SELECT 1 FROM lines l WHERE l.batch = b.seq)
"""
