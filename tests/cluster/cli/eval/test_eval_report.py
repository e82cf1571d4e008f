"""`tramontane eval --report`: from folders of `eval` and files of `bench` to a table, on stdout and in files."""

import json

import pytest

from cluster.cli.main import main
from cluster.eval.journal import Answer
from cluster.eval.report import Prices, Report, as_json, result_of


@pytest.fixture
def folder(tmp_path):
    answers = [
        Answer(key=str(i), model="a", item=f"code/{i}", passed=i < 3, output_tokens=1, seconds=1) for i in range(4)
    ]
    report = Report(models=[result_of("a", answers, Prices())], is_whole=True, command="", began="")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "report.json").write_text(json.dumps(as_json(report)))
    return tmp_path / "one"


def test_a_table_in_three_files(folder, tmp_path, capsys):
    bench = {
        "servers": [{"model": "a"}],
        "levels": [{"level": "1 stream", "server": 0, "metrics": {"requests_per_s": {"median": 7}}}],
    }
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    out = tmp_path / "table"
    options = ["--bench", f"Small model={tmp_path / 'bench.json'}", "--price-per-hour", "2", "--output", str(out)]
    assert main(["eval", "--report", f"Small model={folder}", *options]) == 0
    printed = capsys.readouterr().out
    assert "| Small model | 75% (30 to 95) | 0.0003 | 7.00 |" in printed
    assert (out / "table.md").read_text() == printed
    assert json.loads((out / "table.json").read_text())["models"][0]["load"] == "1 stream"
    assert "<h1>Models</h1>" in (out / "table.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["code", "--report", "one"], "suites has no effect with --report"),
        (["--report", "one", "--model", "a"], "--model has no effect with --report"),
        (["--report", "nowhere"], "--report nowhere cannot be read"),
        (["--report", "one", "--bench", "one/report.json"], "has other contents"),
        (["--bench", "x.json"], "--bench has no effect without --report"),
        (["code", "--price-per-hour", "1"], "--price-per-hour has no effect without --report"),
        (["code", "--metric", "acc"], "--metric has no effect without a suite lm-eval:TASK"),
    ],
)
def test_what_cannot_work_is_said(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder.parent)
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err
