"""A served model as lm-eval wants one, without lm-eval: what is asked once, repeats, settings of generation, and the end by the user."""

import threading
from dataclasses import dataclass

import pytest

from cluster.eval.harness.lm import Asking, ServedLM, Stopped, cut, stop_sequences, temperature
from cluster.eval.harness.tasks import load_tasks
from cluster.eval.journal import Journal
from cluster.eval.model import Generated, Scored
from workers.errors import ConfigError, RequestError


@dataclass
class Request:
    request_type: str
    args: tuple
    doc_id: int = 0
    idx: int = 0
    task_name: str = "task"


class FakeModel:
    name, settings = "m", "s"

    def __init__(self) -> None:
        self.asked: list = []

    def complete(self, prompt, *, max_tokens, stop, seed, fields):
        self.asked.append((prompt, max_tokens, tuple(stop), seed, dict(fields)))
        if prompt == "wrong":
            raise RequestError("too long")
        return Generated(text=f"{prompt}{seed}END rest", prompt_tokens=3, output_tokens=2)

    def score(self, context, continuation):
        self.asked.append((context, continuation))
        return Scored(logprob=-1.5, is_greedy=True, prompt_tokens=4)

    def score_text(self, text):
        self.asked.append(text)
        return Scored(logprob=-9.0)


class Setting:
    def __init__(self, path) -> None:
        self.model, self.journal, self.stop, self.expected = FakeModel(), Journal(path), threading.Event(), 0
        asking = Asking(
            journal=self.journal,
            concurrency=2,
            patience_s=0.0,
            stop=self.stop,
            on_requests=self._expect,
            on_answer=self._answer,
        )
        self.lm = ServedLM(self.model, asking)
        self.answered = 0

    def _expect(self, number):
        self.expected += number

    def _answer(self, _):
        self.answered += 1


@pytest.fixture
def setting(tmp_path):
    setting = Setting(tmp_path / "a.jsonl")
    yield setting
    setting.journal.close()


def test_equal_requests_are_asked_once_and_kept(setting, tmp_path):
    requests = [Request("loglikelihood", ("a", "b"), doc_id=0), Request("loglikelihood", ("a", "b"), doc_id=1)]
    assert setting.lm.loglikelihood(requests) == [(-1.5, True)] * 2
    assert setting.model.asked == [("a", "b")]
    assert setting.answered == setting.expected == 1
    assert {key: len(found) for key, found in setting.lm.answers.items()} == {("task", 0): 1, ("task", 1): 1}
    again = Setting(tmp_path / "a.jsonl")
    assert again.lm.loglikelihood(requests) == [(-1.5, True)] * 2
    assert again.model.asked == []
    assert again.lm.loglikelihood_rolling([Request("loglikelihood_rolling", ("a",))]) == [-9.0]
    again.journal.close()


def test_repeats_are_other_samples_only_where_there_are_samples(setting):
    greedy = {"until": ["END"], "max_gen_toks": 7, "temperature": 0.9, "do_sample": False}
    assert setting.lm.generate_until([Request("generate_until", ("p", greedy))] * 2) == ["p0", "p0"]
    assert setting.model.asked == [("p", 7, ("END",), 0, {"temperature": 0.0})]
    sampled = {"until": "END", "do_sample": True, "top_p": 0.5}
    assert setting.lm.generate_until([Request("generate_until", ("p", sampled))] * 2) == ["p0", "p1"]
    assert sorted(setting.model.asked[1:])[1] == ("p", 256, ("END",), 1, {"top_p": 0.5, "temperature": 1.0})


def test_a_refused_request_is_an_error_of_its_document(setting):
    assert setting.lm.generate_until([Request("generate_until", ("wrong", {}), doc_id=3)]) == [""]
    (answer,) = setting.lm.answers["task", 3]
    assert "too long" in answer.error


def test_the_user_ends_it(setting):
    setting.stop.set()
    with pytest.raises(Stopped):
        setting.lm.loglikelihood([Request("loglikelihood", ("a", "b"))])


def test_settings_of_generation():
    assert stop_sequences({"until": "x"}) == ["x"]
    assert stop_sequences({"until": ["", "x"]}) == ["x"] and stop_sequences({}) == []
    assert temperature({}) == 0.0 and temperature({"temperature": 0.7}) == 0.7
    assert cut("one two three", ["two", "one t"]) == "" and cut("one", ["x"]) == "one"


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(
        ConfigError, match=r"lm-eval:gsm8k needs the package lm-eval.*pip install 'tramontane\[lm-eval\]'"
    ):
        load_tasks(["gsm8k"])
    assert load_tasks([]) == []
