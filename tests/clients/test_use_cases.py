"""The scripts of examples/use_cases against a real server with the demo model. Its answers are nonsense, so what counts is that each script
does its part to the end.
"""

import io
import json
import runpy
import subprocess
import sys

import pytest
from openai import NotFoundError
from support.paths import ROOT
from support.servers.system_server import API_KEY

pytestmark = pytest.mark.system

FOLDER = ROOT / "examples" / "use_cases"
NO_SCRIPT = {"connection.py"}


@pytest.fixture
def run(server, monkeypatch, capsys):
    """Runs a script with arguments, and returns what it printed."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *arguments: str, typed: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_generate_code(run):
    assert len(run("generate_code.py", "a function that adds two numbers")) > 1


def test_debug_code(run, tmp_path):
    assert run("debug_code.py").startswith("NameError: name 'count' is not defined")
    path = tmp_path / "right.py"
    path.write_text("print(1)\n")
    assert run("debug_code.py", str(path)) == "The program runs without an error.\n"


def test_optimize_code(run):
    assert run("optimize_code.py").rstrip().splitlines()[-1].startswith("It ")


def test_summarize(run):
    lines = [line for line in run("summarize.py").splitlines() if ": " in line]
    labels = [line.partition(": ")[0] for line in lines]
    assert sum(label in ("complaint", "question", "praise") for label in labels) >= 2


def test_chat(run):
    out = run("chat.py", typed="Hello\nAnd now?\n\n")
    assert out.count("model> ") == 2


def test_role_play(run):
    assert run("role_play.py", "You are a parrot.").count("model> ") == 2


def test_ask_files(run, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("The key is under the mat.\n\nThe cat is called Miso.\n\nMilk is in the fridge.\n\nNothing else.")
    out = run("ask_files.py", "Where is the key?", str(path))
    assert out.count("[notes.txt: ") == 3


def test_calculate(run):
    assert " = " in run("calculate.py", "What is 12 times 12?")
    evaluate = runpy.run_path(str(FOLDER / "calculate.py"))["evaluate"]
    assert evaluate("2 * (3 + 4)") == 14
    for wrong in ("__import__('os')", "1 / 0", "2 **", "a + 1"):
        with pytest.raises(ValueError, match=r"expression|computed"):
            evaluate(wrong)


def test_text_to_json(run):
    assert set(json.loads(run("text_to_json.py"))) == {"customer", "company", "product", "quantity"}


def test_another_model_by_name(run):
    """An adapter, for example."""
    assert len(run("generate_code.py", "--model", "demo_model", "a function")) > 1
    with pytest.raises(NotFoundError, match="nobody"):
        run("role_play.py", "--model", "nobody")
    with pytest.raises(NotFoundError, match="nobody"):
        run("text_to_json.py", "Ida orders a lamp.", "--model", "nobody")


def test_no_server_is_said(run, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(SystemExit, match=r"Nothing answers at http://127\.0\.0\.1:9/v1/\. Start `make serve`"):
        run("chat.py", typed="Hello\n")


def test_help_is_that_of_the_script():
    shown = subprocess.run(
        [sys.executable, FOLDER / "chat.py", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "Chat in the terminal" in shown and "--model" in shown


def test_every_script_is_tested_and_listed():
    scripts = {path.name for path in FOLDER.glob("*.py")} - NO_SCRIPT
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert scripts <= tested
    page = (FOLDER / "README.md").read_text()
    assert all(f"({name})" in page for name in scripts)
