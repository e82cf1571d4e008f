"""Whether a replica's last report still proves that it works. Pure: ages are arguments, in seconds.

Two questions with different answers on a busy machine. `not_ready_reason`: may a new request go there now? A replica that is late by a
second or two gets none. `is_overdue`: has readiness been missing for so long that /health must say so?
"""

from workers.heartbeat import RECENTLY_S
from workers.protocol import LoadReport

MAX_STEP_S = 30.0  # as long as a collective may take; after that even a busy replica is in doubt
# Older than this plus twice the last step's time, a forward pass no longer proves that the replica works.
MAX_FORWARD_AGE_S = 3.0
# What a process may miss on a machine whose CPUs are busy.
HEALTH_PATIENCE_S = 5.0


def not_ready_reason(replica_id: str, load: LoadReport, *, report_age_s: float) -> str | None:
    """One sentence naming the replica and the rank, or None when all ranks took part in a forward pass a moment ago."""
    if load.stuck_ranks:
        ranks = ", ".join(map(str, load.stuck_ranks))
        return f"Replica {replica_id} is waiting for rank {ranks}, which does not answer."
    if load.forward_age_s is None:
        return f"Replica {replica_id} has not made a forward pass yet."
    age_s = load.forward_age_s + report_age_s
    # A long step, such as a prefill on a slow machine, is not a reason for doubt while no rank keeps the others waiting.
    if load.step_age_s is not None and age_s < MAX_STEP_S:
        return None
    if age_s > MAX_FORWARD_AGE_S + 2 * load.last_step_s:
        return f"Replica {replica_id} made its last forward pass on all ranks {age_s:.1f} s ago."
    return None


def is_overdue(load: LoadReport, *, report_age_s: float, ready_age_s: float) -> bool:
    """Whether a replica that is not ready has been so for too long. ready_age_s: since the last report that proved readiness.

    While reports arrive, their forward pass counts, so that a stuck rank is named in time. Without reports nothing else is known than when
    the last good one came.
    """
    if report_age_s > RECENTLY_S:
        return ready_age_s >= HEALTH_PATIENCE_S
    return load.forward_age_s is None or load.forward_age_s + report_age_s >= HEALTH_PATIENCE_S
