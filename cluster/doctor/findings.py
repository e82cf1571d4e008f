"""The doctor's findings: one for each thing it checked. Knows no facts and no terminal."""

from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Severity(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it serves, but slower, with less room, or not in every case
    PROBLEM = "problem"  # serving fails, or will fail


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check.

    node: the node's address, or None for a finding about several nodes or none. message: what was found. remedy: what to do;
    empty only for an ok.
    """

    check: str
    severity: Severity
    message: str = msgspec.field(name="sentence")  # the name of it that scripts read in `doctor --json`
    remedy: str = ""
    node: str | None = None


def ok(check: str, message: str, *, node: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.OK, message=message, node=node)


def warning(check: str, message: str, remedy: str, *, node: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, message=message, remedy=remedy, node=node)


def problem(check: str, message: str, remedy: str, *, node: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.PROBLEM, message=message, remedy=remedy, node=node)


def count(findings: Sequence[Finding], severity: Severity) -> int:
    return sum(f.severity is severity for f in findings)
