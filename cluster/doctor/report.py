"""How findings are shown: a table for people, JSON for scripts. Knows the terminal; makes no findings of its own."""

from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from cluster.doctor.amounts import counted
from cluster.doctor.facts import AllReduceFailure, AllReduceResult, AllReduceSkipped, Node
from cluster.doctor.findings import Finding, Severity, count
from cluster.terminal.tables import plain_table

_STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.PROBLEM: "bold red"}


def render(findings: Sequence[Finding]) -> RenderableType:
    """A table with the findings about several nodes first, then those of each node. A remedy stands below its finding."""
    table = plain_table()
    table.add_column("Check", no_wrap=True)
    table.add_column("Result", no_wrap=True)
    table.add_column("Finding", overflow="fold")
    nodes = list(dict.fromkeys(finding.node for finding in findings))
    for node in sorted(nodes, key=lambda node: (node is not None, nodes.index(node))):
        if node is not None and len(nodes) > 1:
            table.add_section()
            table.add_row(Text(node, style="bold"), "", "")
        for finding in (f for f in findings if f.node == node):
            text = Text(finding.message)
            if finding.remedy:
                text.append(f"\n→ {finding.remedy}", style="cyan")
            table.add_row(finding.check, Text(finding.severity.value, style=_STYLES[finding.severity]), text)
    return Group(table, Text(summary(findings), style="bold"))


def summary(findings: Sequence[Finding]) -> str:
    return (
        f"{counted(count(findings, Severity.PROBLEM), 'problem')}, {counted(count(findings, Severity.WARNING), 'warning')}, "
        f"{count(findings, Severity.OK)} ok."
    )


def to_json(
    findings: Sequence[Finding],
    *,
    nodes: Sequence[Node],
    all_reduce: AllReduceResult | AllReduceFailure | AllReduceSkipped | None,
) -> str:
    """The findings and the facts they come from."""
    body = {
        "num_problems": count(findings, Severity.PROBLEM),
        "num_warnings": count(findings, Severity.WARNING),
        "findings": findings,
        "all_reduce": None
        if all_reduce is None
        else {"outcome": _OUTCOMES[type(all_reduce)], **msgspec.to_builtins(all_reduce)},
        "nodes": nodes,
    }
    return msgspec.json.format(msgspec.json.encode(body), indent=2).decode()


_OUTCOMES: dict[type, str] = {
    AllReduceResult: "measured",
    AllReduceFailure: "failed",
    AllReduceSkipped: "not tried",
}
