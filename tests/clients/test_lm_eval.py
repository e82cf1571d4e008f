"""lm-eval gives the served model the same scores as transformers gives the same checkpoint: log-likelihoods, outputs and metrics.

lm-eval uses HTTP, batches of token ids, `echo` and `logprobs`. The reference here is MistralForCausalLM in fp32 with SentencePiece's
own ids, and lm-eval's formulas written out.
"""

import json
import math
import os
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from support.clients.foreign_clients import DEMO_MODEL, OFFLINE, PYTHON, run, write_tokenizer
from support.paths import ROOT
from support.servers.system_server import API_KEY
from transformers import MistralForCausalLM

FOLDER = Path(__file__).parent
MAX_NEW_TOKENS = 16  # tramontane_endings.yaml

pytestmark = [pytest.mark.clients, pytest.mark.system, pytest.mark.timeout(300)]


class Reference:
    def __init__(self) -> None:
        self.sp = SentencePieceProcessor(model_file=str(DEMO_MODEL / "tokenizer.model.v3"))
        self.model = MistralForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The continuation's log-likelihood, and whether greedy sampling would choose it."""
        ids = torch.tensor([context + continuation])
        logprobs = self.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        target = torch.tensor(continuation)
        return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())

    def score_text(self, context: str, continuation: str) -> tuple[float, bool]:
        ids, whole = self.sp.encode(context), self.sp.encode(context + continuation)
        return self.score(ids, whole[len(ids) :])  # as lm-eval does, even where encoding both together gives other ids

    def score_file(self, text: str) -> float:
        return self.score([self.sp.bos_id()], self.sp.encode(text))[0]

    @torch.inference_mode()
    def next_is_end(self, ids: list[int]) -> bool:
        return self.model(torch.tensor([ids])).logits[0, -1].argmax().item() == self.sp.eos_id()

    @torch.inference_mode()
    def complete_line(self, prompt: str) -> str:
        """The rest of the prompt's last line, with greedy sampling."""
        ids = self.sp.encode(prompt)
        output = self.model.generate(
            torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0
        )[0].tolist()
        return self.sp.decode(output)[len(self.sp.decode(ids)) :].split("\n")[0]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def evaluations(server, tmp_path_factory) -> list[dict[str, Any]]:
    """With transformers' tokenizer, and with the server's own."""
    cwd = tmp_path_factory.mktemp("lm_eval")
    output = run(
        [FOLDER / "foreign" / "lm_eval_client.py", "4", "huggingface", "remote"],
        server=server,
        cwd=cwd,
        env={"TRAMONTANE_TOKENIZER": str(write_tokenizer(cwd / "tokenizer"))},
        timeout_s=280,
    )
    # Between progress bars.
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"scores": ')]


@pytest.fixture(scope="module")
def evaluation(evaluations) -> dict[str, Any]:
    return evaluations[0]


def test_the_servers_own_tokenizer_gives_the_same(evaluations):
    ours, remote = evaluations
    assert set(ours["samples"]) == set(remote["samples"]) and all(ours["samples"].values())
    for task, samples in ours["samples"].items():
        assert remote["samples"][task] == samples, task


def documents(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / "lm_eval_task" / name).read_text())


def test_multiple_choice(evaluation, reference):
    docs = documents("choices.json")
    expected = [[reference.score_text(d["code"], choice) for choice in d["choices"]] for d in docs]
    for doc, ours, theirs in zip(docs, evaluation["samples"]["tramontane_choices"], expected, strict=True):
        for (logprob, greedy), (reference_logprob, reference_greedy) in zip(ours, theirs, strict=True):
            assert logprob == pytest.approx(reference_logprob, abs=1e-3), doc
            assert greedy == reference_greedy, doc
    best = [max(range(3), key=lambda i: row[i][0]) for row in expected]
    best_norm = [
        max(range(3), key=lambda i: row[i][0] / len(d["choices"][i])) for d, row in zip(docs, expected, strict=True)
    ]
    scores = evaluation["scores"]["tramontane_choices"]
    assert scores["acc,none"] == pytest.approx(share(b == d["answer"] for b, d in zip(best, docs, strict=True)))
    assert scores["acc_norm,none"] == pytest.approx(
        share(b == d["answer"] for b, d in zip(best_norm, docs, strict=True))
    )
    assert 0 < scores["acc,none"] < 1, "a task with only right or only wrong answers proves little"
    assert {greedy for row in expected for _, greedy in row} == {True, False}


def test_generation(evaluation, reference):
    docs = documents("endings.json")
    expected = [reference.complete_line(d["code"]) for d in docs]
    assert evaluation["samples"]["tramontane_endings"] == [[text] for text in expected]
    score = share(text == d["ending"] for text, d in zip(expected, docs, strict=True))
    assert evaluation["scores"]["tramontane_endings"]["exact_match,none"] == pytest.approx(score)
    assert 0 < score < 1


def test_whole_files(evaluation, reference):
    texts = [d["text"] for d in documents("files.json")]
    expected = [reference.score_file(text) for text in texts]
    ours = evaluation["samples"]["tramontane_files"]
    assert [o[0] for o in ours] == pytest.approx(expected, abs=1e-3)
    total, scores = sum(expected), evaluation["scores"]["tramontane_files"]
    num_words = sum(len(re.split(r"\s+", text)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(-total / num_words), rel=1e-4)
    assert scores["byte_perplexity,none"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-4)
    assert scores["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)
    encoded = [reference.sp.encode(text) for text in texts]
    assert max(map(len, encoded)) > reference.model.config.sliding_window
    assert any(reference.next_is_end([reference.sp.bos_id(), *ids]) for ids in encoded), (
        "one file should be followed by the end token, whose entry lm-eval cuts off"
    )


# What of ours the clients' environment has not comes from here. Importing lm-eval takes long, so one process runs several commands.
OUR_COMMANDS = """
import json, sys
from pathlib import Path
root, libraries, out, commands = sys.argv[1:]
sys.path[:0] = [root]
sys.path.append(libraries)
from cluster.cli.main import main
reports = []
for command in json.loads(commands):
    status = main([*command, "--output", out])
    if status:
        sys.exit(status)
    report = json.loads((Path(out) / "report.json").read_text())["models"][0]
    kept = [json.loads(line) for line in (Path(out) / "answers.jsonl").read_text().splitlines()]
    reports.append({**report, "kept": kept})
(Path(out) / "reports.json").write_text(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def our_reports(server, tmp_path_factory) -> list[dict[str, Any]]:
    """What `tramontane eval` reports, and the answers kept so far, always in the same folder: some items, then in another process all
    tasks, and two of them without the begin token, which lm-eval's own client leaves out.
    """
    out = tmp_path_factory.mktemp("eval")

    def command(*names: str, options: Sequence[str] = ()) -> list[str]:
        suites = ",".join(f"lm-eval:tramontane_{name}.yaml" for name in names)
        return ["eval", suites, "--url", server.url, "--model", "demo_model", *options]

    def run(*commands: list[str]) -> list[dict[str, Any]]:
        arguments = [str(ROOT), sysconfig.get_path("purelib"), str(out), json.dumps(commands)]
        done = subprocess.run(
            [str(PYTHON), "-c", OUR_COMMANDS, *arguments],
            cwd=FOLDER / "lm_eval_task",
            env={**os.environ, **OFFLINE, "TRAMONTANE_API_KEY": API_KEY, "HF_HOME": str(out / "hf")},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-20_000:]
        return json.loads((out / "reports.json").read_text())

    without = command("choices", "endings", options=["--set", "add_special_tokens=false"])
    return [
        *run(command("choices", options=["--max-items", "5"])),
        *run(command("choices", "endings", "files"), without),
    ]


def test_our_command_scores_what_the_model_computes(our_reports, reference):
    """With the begin token, as any client's text is encoded."""
    some, found, _ = our_reports
    assert len(some["kept"]) == 15
    choices, endings, files = (found["suites"][f"tramontane_{name}"] for name in ("choices", "endings", "files"))
    items = {
        name: [a for a in found["kept"] if a["item"].startswith(f"tramontane_{name}/")] for name in ("choices", "files")
    }
    docs, bos = documents("choices.json"), reference.sp.bos_id()
    assert len(items["choices"]) == 3 * len(docs), "what was answered before is not asked again"
    logprobs: dict[str, float] = {a["item"]: a["logprob"] for a in items["choices"]}
    right = 0
    for i, doc in enumerate(docs):
        num_context = 1 + len(reference.sp.encode(doc["code"]))
        whole = [[bos, *reference.sp.encode(doc["code"] + choice)] for choice in doc["choices"]]
        expected = [reference.score(ids[:num_context], ids[num_context:])[0] for ids in whole]
        assert [logprobs[f"tramontane_choices/{i}/{n}"] for n in range(3)] == pytest.approx(expected, abs=1e-3)
        right += max(range(3), key=expected.__getitem__) == doc["answer"]
    assert (choices["share"]["passed"], choices["share"]["total"]) == (right, len(docs))
    assert endings["output_tokens"] > 0 and choices["prompt_tokens"] > 0
    texts = [d["text"] for d in documents("files.json")]
    total = sum(reference.score_file(text) for text in texts)
    num_words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert files["share"]["value"] == pytest.approx(math.exp(-total / num_words), rel=1e-3)
    assert not files["share"]["is_more_better"] and "passed" not in files["share"]
    assert found["total"]["share"]["total"] == choices["share"]["total"] + endings["share"]["total"]


def test_our_command_scores_as_lm_eval_does(our_reports, evaluation):
    """Without the begin token."""
    found, scores = our_reports[2], evaluation["scores"]
    for name, metric in (("choices", "acc"), ("endings", "exact_match")):
        assert found["suites"][f"tramontane_{name}"]["share"]["value"] == scores[f"tramontane_{name}"][f"{metric},none"]
    norm = found["more"]["tramontane_choices"]["tramontane_choices"]["acc_norm,none"]
    assert norm == pytest.approx(scores["tramontane_choices"]["acc_norm,none"])


def share(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
