"""Whether the checkpoint is complete and the same on every node that runs ranks."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from cluster.doctor.amounts import counted, format_bytes
from cluster.doctor.facts import Model, Node
from cluster.doctor.findings import Finding, ok, problem

CHECK = "model"


def judge_models(nodes: Sequence[Node]) -> Iterator[Finding]:
    found = [(node.address, node.model) for node in nodes if node.model is not None]
    for address, model in found:
        for fault in model.faults:
            yield problem(CHECK, fault.message, fault.remedy, node=address)
    complete = [(address, model) for address, model in found if not model.faults]
    by_fingerprint: dict[str | None, list[str]] = defaultdict(list)
    for address, model in complete:
        by_fingerprint[model.fingerprint].append(address)
    if len(by_fingerprint) > 1:
        groups = " and ".join(", ".join(addresses) for addresses in by_fingerprint.values())
        remedy = "Download the same --revision on every node, or copy the folder from one node to the others."
        yield problem(CHECK, f"The files in {complete[0][1].folder} are not the same on {groups}.", remedy)
    elif complete:
        same = f", the same on {len(complete)} nodes" if len(complete) > 1 else ""
        yield ok(CHECK, f"{_summary(complete[0][1])}{same}.")


def _summary(model: Model) -> str:
    files = counted(model.num_files, "weight file")
    left_out = "" if model.left_out is None else f". Left out: {model.left_out}"
    return f"{model.folder} is complete: {files}, {format_bytes(model.num_bytes)}, and a tokenizer{left_out}"
