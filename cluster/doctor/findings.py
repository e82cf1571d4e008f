"""What the doctor says: one finding per thing looked at, and what a script is told. Knows no facts and no terminal."""

from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Severity(StrEnum):
    OK = "ok"
    WARNING = "warning"  # serves, but slower, with less room, or not in every case
    PROBLEM = "problem"  # serving fails, or will


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`node`: its address, or None for what concerns all of them or none. `remedy`: what to do; "" only where all is well."""

    check: str
    severity: Severity
    sentence: str
    remedy: str = ""
    node: str | None = None


def ok(check: str, sentence: str, *, node: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.OK, sentence=sentence, node=node)


def warning(check: str, sentence: str, remedy: str, *, node: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, sentence=sentence, remedy=remedy, node=node)


def problem(check: str, sentence: str, remedy: str, *, node: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.PROBLEM, sentence=sentence, remedy=remedy, node=node)


def count(findings: Sequence[Finding], severity: Severity) -> int:
    return sum(f.severity is severity for f in findings)
