"""The table of what steps ask of the device, and the comparison with it."""

import json
from collections import Counter
from pathlib import Path

from cuda_host.fake_device import Record

TABLE = Path(__file__).with_name("step_counts.json")


def compare(name: str, record: Record) -> None:
    """Prints the counts. Fails where they are larger than the table's."""
    counts, expected = record.summary(), json.loads(TABLE.read_text())[name]
    print(f"\n{name}: {json.dumps(counts)}")
    grown = {kind: (n, expected.get(kind, 0)) for kind, n in counts.items() if n > expected.get(kind, 0)}
    kinds = Counter(call.split(" grid=")[0].split(" m=")[0][:120] for call in record.calls)
    calls = "\n".join(f"{n:5} {kind}" for kind, n in kinds.most_common())
    assert not grown, f"{name}: more than {TABLE.name} has, as (now, there): {grown}. All calls:\n{calls}"
