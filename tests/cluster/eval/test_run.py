"""Asking: answers are kept, asked once, asked again after an error, and a busy server is waited for."""

import threading

import pytest

from cluster.eval import patience as patience_module
from cluster.eval.journal import Answer, Journal, request_key
from cluster.eval.model import Generated, Scored
from cluster.eval.run import Plan, evaluate
from cluster.eval.suite import load_suite
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

ITEMS = load_suite("reasoning")


class FakeModel:
    """Answers 42 to everything. failures: what the first requests raise."""

    def __init__(self, name="m", failures=(), settings=None):
        self.name, self.settings = name, settings or {}
        self.failures = list(failures)
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def generate(self, item):
        with self.lock:
            self.asked.append(item.id)
            if self.failures:
                raise self.failures.pop(0)
        return Generated(text="42", prompt_tokens=10, output_tokens=2)

    def logprob(self, item, option):
        return Scored(logprob=-float(len(option)), prompt_tokens=7)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_S", 0.0)


def plan(number=5, **settings):
    return Plan(items=ITEMS[:number], concurrency=2, **settings)


def test_every_item_is_asked_once_and_kept(tmp_path):
    model = FakeModel()
    with Journal(tmp_path / "a.jsonl") as journal:
        answers = evaluate([model], plan(), journal)["m"]
        assert sorted(model.asked) == sorted(item.id for item in ITEMS[:5])
        assert [a.item for a in answers] == [item.name for item in ITEMS[:5]]
        assert [a.passed for a in answers] == [True, False, False, False, False]
    again = FakeModel()
    with Journal(tmp_path / "a.jsonl") as journal:
        assert evaluate([again], plan(), journal)["m"] == answers
    assert again.asked == []


def test_a_change_of_the_model_or_its_settings_asks_again(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        evaluate([FakeModel()], plan(), journal)
        for other in (FakeModel("n"), FakeModel(settings={"top_p": 0.5})):
            evaluate([other], plan(), journal)
            assert len(other.asked) == 5


def test_a_torn_line_is_asked_again(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        evaluate([FakeModel()], plan(), journal)
    path.write_bytes(path.read_bytes()[:-7])
    model = FakeModel()
    with Journal(path) as journal:
        assert len(evaluate([model], plan(), journal)["m"]) == 5
    assert len(model.asked) == 1
    with Journal(path) as journal:
        assert len(journal.answers) == 5


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("hello\n")
    with pytest.raises(ConfigError, match="not a file of this command"):
        Journal(tmp_path / "a.jsonl")


def test_a_busy_server_is_asked_again_and_a_refusal_is_an_error(tmp_path):
    model = FakeModel(failures=[ReplicaUnavailableError("busy"), ReplicaUnavailableError("busy")])
    with Journal(tmp_path / "a.jsonl") as journal:
        assert all(a.error is None for a in evaluate([model], plan(), journal)["m"])
        assert len(model.asked) == 7
        refused = FakeModel("r", failures=[RequestError("too long")])
        answers = evaluate([refused], plan(), journal)["r"]
        assert [a.error is not None for a in answers].count(True) == 1
        assert "too long" in next(a.error for a in answers if a.error)
    again = FakeModel("r")
    with Journal(tmp_path / "a.jsonl") as journal:
        assert all(a.error is None for a in evaluate([again], plan(), journal)["r"])
    assert len(again.asked) == 1, "only what had an error"


def test_patience_ends(tmp_path):
    model = FakeModel(failures=[ReplicaUnavailableError("gone")] * 1000)
    with Journal(tmp_path / "a.jsonl") as journal:
        (answer,) = evaluate([model], plan(1, patience_s=0.0), journal)["m"]
    assert "gone" in answer.error


def test_stop_leaves_out_what_is_missing(tmp_path):
    stop = threading.Event()

    class Stopping(FakeModel):
        def generate(self, item):
            if len(self.asked) >= 3:
                stop.set()
            return super().generate(item)

    with Journal(tmp_path / "a.jsonl") as journal:
        found = evaluate([Stopping()], plan(20), journal, stop=stop)["m"]
        assert len(journal.answers) == len(found)
    assert 3 <= len(found) <= 6, "those that had begun"


def test_the_tokens_of_a_choice_count(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("items: [{id: a, prompt: Is it short, check: {choice: {options: [aye, certainly], answer: aye}}}]")
    with Journal(tmp_path / "a.jsonl") as journal:
        (answer,) = evaluate([FakeModel()], Plan(items=load_suite(str(path))), journal)["m"]
    assert (answer.passed, answer.prompt_tokens, answer.output_tokens) == (True, 14, 0)


def test_a_judge_is_asked_with_question_and_answer(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text('items: [{id: a, prompt: Greet me., check: {judge: "Is it kind?"}}]')

    asked: list[tuple[str, str]] = []

    class FakeJudge:
        settings = "judge"

        def verdict(self, item, question, answer):
            asked.append((question, answer))
            return True

    with Journal(tmp_path / "a.jsonl") as journal:
        (answer,) = evaluate([FakeModel()], Plan(items=load_suite(str(path))), journal, judge=FakeJudge())["m"]
    assert answer.passed
    assert asked == [("Is it kind?", "42")]


def test_keys_differ_with_every_part():
    assert len({request_key("a", 1), request_key("a", 2), request_key("a"), request_key("a", "1")}) == 4
    assert Answer(key="k", model="m", item="s/i").error is None
