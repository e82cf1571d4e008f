"""Prose in plain English: no file a person reads holds one of the phrases that this project once overused.

Reads string literals, comments and names of Python files, and the whole text of everything else. The list is short on purpose: it
catches relapses, it does not teach style. CONTRIBUTING.md does that.
"""

import re
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

# pattern (case-insensitive) -> what to write instead
PHRASES = {
    r"\bwhoever\b": "name who: the caller, the client, anyone who ...",
    r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b|one\b)": "is not a ..., has no ...",
    r"\bbehind\b(?! (a |an |the |its |one |another |such )?(\w+ ){0,2}"
    r"(proxy|proxies|load balancer|firewall|nat|gateway|ingress|endpoint|interface|scenes?)\b)": "after, beyond, below",
    r"\bwish(es|ed)?\b": "spec, request",
    r"\bheed(s|ed)?\b": "act on",
    r"\bneedless(ly)?\b": "idle, unnecessary",
    r"\bshared out\b": "split",
    r"\bshall\b": "should, must, will",
    r"\banew\b": "again",
    r"\bseats?\b": "slot",
    r"\bgoes away\b|\bgo away\b|\bwent away\b": "is preempted, disconnects, leaves",
    r"\bsends? the followers home\b": "stops the followers",
    r"\btakes? no notice\b": "ignores",
    r"\bgood[- ]for[- ]nothing\b": "useless",
    r"\bno admin's\b": "requires an admin key",
    r"\bis packed\b": "is compressed",
}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".sh", ".txt", ".jinja", ".cfg"}
FOLDERS = ("cluster", "workers", "deploy", "sky", "docs", "examples", "benchmarks", "tests")
LEFT_OUT = (
    "tests/test_plain_english.py",
    "examples/demo_model/corpus.py",  # what the demo model read
    "tests/clients/lm_eval_task/",  # texts that a model judges
    "CHANGELOG.md",
    "CONTRIBUTING.md",  # its table shows what not to write
)


def files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return sorted(
        name
        for name in listed
        if (name.startswith(tuple(f"{f}/" for f in FOLDERS)) or "/" not in name)
        and Path(name).suffix in SUFFIXES
        and not name.startswith(LEFT_OUT)
        and (ROOT / name).is_file()
    )


def hits(text: str) -> list[str]:
    """`line: phrase (write: ...)` for each phrase in the text."""
    found = []
    for pattern, better in PHRASES.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{line}: {match[0]!r} (write: {better})")
    return found


def test_no_such_phrase() -> None:
    found = {name: hits((ROOT / name).read_text(encoding="utf-8")) for name in files()}
    assert len(found) > 500, "the list of files is not that of this repository"
    wrong = [f"{name}:{hit}" for name, hits_of_file in found.items() for hit in hits_of_file]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "num_hits"),
    [
        ("This API key is no admin's, which this path needs", 2),
        ("the model is no longer loaded; there is no file; it is no one's", 0),
        ("how long a replica must have been needless", 1),
        ("Whoever asks behind the others shall wait", 3),
        ("a server behind a load balancer, behind the reverse proxy, behind an Nginx ingress", 0),
        ("2 are enough.", 0),
    ],
)
def test_the_phrases_are_found(text: str, num_hits: int) -> None:
    assert len(hits(text)) == num_hits
