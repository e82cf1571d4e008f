"""The checkpoint as every node that holds ranks sees it: complete, and the same everywhere."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Model, Node
from cluster.doctor.findings import Finding, ok, problem
from cluster.doctor.words import counted, size

CHECK = "model"


def judge_models(nodes: Sequence[Node]) -> Iterator[Finding]:
    seen = [(node.address, node.model) for node in nodes if node.model is not None]
    for address, model in seen:
        for fault in model.faults:
            yield problem(CHECK, fault.sentence, fault.remedy, node=address)
    whole = [(address, model) for address, model in seen if not model.faults]
    by_print: dict[str | None, list[str]] = defaultdict(list)
    for address, model in whole:
        by_print[model.fingerprint].append(address)
    if len(by_print) > 1:
        groups = " and ".join(", ".join(addresses) for addresses in by_print.values())
        remedy = "Download the same revision on every node (--revision), or copy the folder from one to the others."
        yield problem(CHECK, f"The files in {whole[0][1].folder} are not the same on {groups}.", remedy)
    elif whole:
        yield ok(CHECK, f"{_summary(whole[0][1])}{f', the same on {len(whole)} nodes' if len(whole) > 1 else ''}.")


def _summary(model: Model) -> str:
    return f"{model.folder} is complete: {counted(model.num_files, 'file')} of weights, {size(model.num_bytes)}, and a tokenizer"
