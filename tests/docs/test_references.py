"""What the pages refer to exists: links and their anchors, paths of this repository, make targets, and options of `tramontane`."""

import re
from pathlib import Path

import pytest
from support.cloud.sky_reading import commands_in
from support.documents import anchors, fences, links, name_of, pages, spans
from support.paths import ROOT
from test_imports import ORDER, ranks_of

from cluster.api.endpoints.table import ENDPOINTS
from cluster.cli.options.parser import make_parser
from cluster.cli.options.table import COMMANDS

PAGES = pages()
TOP = ("cluster", "workers", "deploy", "sky", "tests", "docs", "benchmarks", "examples")
PATH = re.compile(rf"(?:{'|'.join(TOP)})/[\w./*-]*[\w/*]")
# Places in the ordered list for code to come: docs may name them before their first file exists.
PLANNED = {
    f"{top}{package}/{unit}" for top in ("", "tests/") for package, order in ORDER.items() for unit in ranks_of(order)
}
GENERATED = ("deploy/docker/.env", "deploy/prometheus/api_key", "sky/my.yaml", "build/")
# Options of other tools that the pages mention outside of commands: option -> tool.
FOREIGN = {
    "--loads-only": "benchmarks/adapters.py",
    "--merge": "examples/finetune",
    "--quantize": "examples/finetune",
    "--save-every": "examples/finetune",
    "--array": "sbatch",
    "--entrypoint": "docker",
    "--env": "sky",
    "--gpus": "sky, docker",
    "--image-id": "sky",
    "--infra": "sky",
    "--num-jobs": "sky",
    "--region": "sky",
    "--secret": "sky",
    "--shm-size": "docker",
    "--torch-backend": "uv",
    "--fix": "ruff",
}


# Beginnings of messages that docs/deploy quotes, so that a reader finds them by searching.
MESSAGES = (
    "would open the server to the network without a key",
    "The cluster had no room for the replica",
    "is gated",
    "is missing part",
    "has parts from more than one split",
    "has not answered for",
    "server_leaving",
    "Not ready to serve",
)
OPTIONS = {"--help", "--version"} | {
    name for command in COMMANDS for option in command.options for name in option.names
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        is_there = target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))
        if not is_there:
            dead.append(link)
    assert not dead, f"{name_of(page)} links to what does not exist: {dead}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_of_this_repository_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    words = [word for span in spans(text) for word in span.split()]
    words += [word for fence in fences(text) if fence.kind == "sh" for word in fence.text.split()]
    missing = set()
    for word in words:
        # `-v "$PWD/deploy/x:/y"` names deploy/x; a URL that holds /docs names nothing of ours.
        for match in PATH.finditer(word.replace("$PWD/", "")):
            path = match[0]
            starts = match.start() == 0 or word[match.start() - 1] in "\"'=([:" or "$PWD/" in word
            if (
                starts
                and not path.startswith(GENERATED)
                and path.rstrip("/") not in PLANNED
                and not any(ROOT.glob(path.rstrip("/")))
            ):
                missing.add(path)
    assert not missing, f"{name_of(page)} names paths that do not exist: {sorted(missing)}"


def test_the_pages_that_other_files_name_exist() -> None:
    """A YAML, a chart or a docstring that sends its reader to a page."""
    folders = [ROOT / name for name in ("benchmarks", "cluster", "deploy", "examples", "sky", "workers", ".github")]
    files = [ROOT / "Makefile", *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    named = set()
    for file in files:
        if file.suffix not in (".pyc", ".so"):
            named |= set(re.findall(rb"\bdocs/[\w/-]+\.md\b", file.read_bytes()))
    assert len(named) > 5
    assert sorted(name.decode() for name in named if not (ROOT / name.decode()).is_file()) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = [*spans(text), *(fence.text for fence in fences(text) if fence.kind == "sh")]
    named = {target for part in code for target in re.findall(r"(?:^|sudo |\s)make ([a-z][a-z0-9-]*)", part)}
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets, f"{name_of(page)}: the Makefile has no {sorted(named - targets)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_named_in_the_text_exist(page: Path) -> None:
    """Options in inline code. Whole commands of `tramontane` are parsed below."""
    named = set()
    for span in spans(page.read_text(encoding="utf-8")):
        if span.startswith(("--", "tramontane ")):
            named |= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span))
    unknown = named - OPTIONS - set(FOREIGN)
    assert not unknown, f"{name_of(page)} names options that no command has: {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_tramontane_parse(page: Path) -> None:
    for fence in fences(page.read_text(encoding="utf-8")):
        if fence.kind == "sh":
            for command in commands_in(fence.text, "tramontane"):
                try:
                    make_parser().parse_args(command[1:])
                except SystemExit as e:
                    if e.code:
                        pytest.fail(f"{name_of(page)}:{fence.line}: `{' '.join(command)}` is refused")


def test_every_endpoint_is_in_the_table_of_docs_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = " ".join(line.partition(" | ")[0] for line in text.splitlines() if line.startswith("| `"))
    named = [re.sub(r"{.*", "", path) for path in re.findall(r"/[\w/{}.]*", rows)]
    missing = [e.path for e in ENDPOINTS if not any(e.path.startswith(path) for path in named if path != "/")]
    assert not missing, f"the table of docs/api.md lacks {missing}"


def test_quoted_messages_are_those_of_the_code() -> None:
    docs = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "deploy").glob("*.md"))
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "cluster").rglob("*.py"))
    assert [m for m in MESSAGES if m not in docs] == [], "docs/deploy no longer quotes these; take them off the list"
    assert [m for m in MESSAGES if m not in code] == [], "docs/deploy quotes messages that the code no longer has"
