"""The demo model's training text: the Python standard library's own source and docstrings (PSF licence).

Knows which files are read, how question/answer pairs are cut from docstrings, and which documents are held out.
Does not know tokens or training. The held-out set is chosen by a hash of the file name, so it is the same every time.
"""

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tables of characters, generated parsers and fixtures teach a small model nothing.
EXCLUDED = ("site-packages", "test", "tests", "encodings", "lib2to3", "pydoc_data", "__pycache__", "idle_test")
MAX_ANSWER_CHARS = 900
HELD_OUT_SHARE = 0.02

IDENTITY = (
    (("Hello!", "Hi", "Hello, who are you?", "Who are you?", "What are you?"),
     "Hello! I am the Tramontane demo model: a very small language model trained on the Python standard library. "
     "Ask me what a function of the standard library does."),
    (("What can you do?", "Help", "What should I ask you?"),
     "I can describe functions of the Python standard library and continue Python code. "
     "I am small, so check what I say."),
    (("Thank you!", "Thanks", "Goodbye"), "You are welcome."),
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """Plain text when `question` is None, else one chat turn."""

    text: str
    question: str | None
    held_out: bool


def documents(*, seed: int = 0) -> list[Document]:
    """Every source file as one document, and every usable docstring as one or two chat turns, in a seeded order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rng = random.Random(seed)
    result = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if set(name.parts) & set(EXCLUDED):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        held_out = _fraction(str(name)) < HELD_OUT_SHARE
        result.append(Document(text=source, question=None, held_out=held_out))
        module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        for question, answer in _pairs(tree, module, source, rng):
            result.append(Document(text=answer, question=question, held_out=held_out))
    for questions, answer in IDENTITY:
        result += [Document(text=answer, question=q, held_out=False) for q in questions for _ in range(12)]
    rng.shuffle(result)
    return result


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _pairs(tree: ast.AST, module: str, source: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    lines = source.splitlines()

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            name = f"{prefix}.{child.name}"
            doc = ast.get_docstring(child)
            if doc and len(doc) > 20:
                kind = "class" if isinstance(child, ast.ClassDef) else "function"
                yield _ask_what(name, kind, rng), doc[:MAX_ANSWER_CHARS].strip()
                code = textwrap.dedent("\n".join(lines[child.lineno - 1 : child.end_lineno]))
                if len(code) <= MAX_ANSWER_CHARS:
                    summary = " ".join(doc.split("\n\n")[0].split())
                    yield _ask_write(child.name, kind, summary, rng), code
            yield from visit(child, name)

    doc = ast.get_docstring(tree) if isinstance(tree, ast.Module) else None
    if doc:
        yield f"What is the module `{module}` for?", doc[:MAX_ANSWER_CHARS].strip()
    yield from visit(tree, module)


def _ask_what(name: str, kind: str, rng: random.Random) -> str:
    short = name.rsplit(".", 1)[-1]
    return rng.choice(
        (f"What does `{name}` do?", f"Explain the {kind} `{name}`.", f"What is `{name}`?", f"Describe `{short}`.")
    )


def _ask_write(name: str, kind: str, summary: str, rng: random.Random) -> str:
    return rng.choice(
        (
            f"Write the {kind} `{name}`: {summary}",
            f"Write a Python {kind} `{name}`. {summary}",
            f"Show the code of `{name}`.",
        )
    )
