"""How `eval` reads log-probabilities: which tokens belong to a continuation, and texts that are longer than the model's context."""

import msgspec
import pytest

from cluster.cli.eval.served_model import ServedModel, windows
from workers.errors import ConfigError, RequestError


class FakeClient:
    """Each character is a token, but for `joined`, which are one; their log-probabilities are -1, -2 and so on. No begin token."""

    url = "http://x"

    def __init__(self, *, joined: str = "", context: int | None = None, logprobs: bool = True) -> None:
        self.joined, self.context, self.logprobs = joined, context, logprobs
        self.bodies: list[dict] = []

    def get(self, path, kind):
        return msgspec.convert({"data": [{"id": "m", "max_model_len": self.context}]}, kind)

    def post(self, path, body, kind):
        if path == "/tokenize":
            if self.context is None:
                raise ConfigError("no such endpoint")
            return kind(tokens=[ord(c) for c in body["prompt"]])
        self.bodies.append(body)
        prompt = body["prompt"]
        texts = list(prompt) if self.joined not in prompt or not self.joined else self._split(prompt)
        offsets, at = [], 0
        for text in texts:
            offsets.append(at)
            at += len(text) if isinstance(text, str) else 1
        values = [None, *[-float(i) for i in range(1, len(texts))]]
        answer = {"text": "", "logprobs": {"token_logprobs": values, "text_offset": offsets}}
        answer["logprobs"]["top_logprobs"] = [None, *[{"x": -2.0} for _ in values[1:]]]
        if not self.logprobs:
            del answer["logprobs"]
        return msgspec.convert({"choices": [answer], "usage": {"prompt_tokens": len(texts)}}, kind)

    def _split(self, prompt):
        before, after = prompt.split(self.joined)
        return [*before, self.joined, *after]


def model(client) -> ServedModel:
    return ServedModel(client, "m", uses_chat=False, fields={})


def test_the_tokens_of_a_continuation():
    scored = model(FakeClient()).score("ab", "cd")
    assert (scored.logprob, scored.is_greedy, scored.prompt_tokens) == (-2 - 3, False, 4)
    assert model(FakeClient()).score("a", "b").is_greedy, "-1 is more than -2"


def test_a_continuation_has_the_tokens_after_as_many_as_the_context_has_alone():
    client = FakeClient(joined=" c")
    assert model(client).score("ab ", "cd").logprob == -2 - 3
    assert [body["prompt"] for body in client.bodies] == ["ab cd", "ab"]
    assert model(FakeClient(joined="bc")).score("ab", "cd").logprob == -2, "a, bc, d: the context alone has two"
    assert model(FakeClient()).score("ab ", "cd").logprob == -2 - 3 - 4, "the space is the continuation's"
    assert model(FakeClient()).score("", "abc").logprob == -1 - 2


def test_a_context_is_counted_once():
    client = FakeClient()
    asked = model(client)
    for option in ("c", "d"):
        asked.score("ab", option)
    assert [body["prompt"] for body in client.bodies] == ["abc", "ab", "abd"]


def test_a_long_text_in_windows():
    client = FakeClient(context=5)
    scored = model(client).score_text("abcdefgh")
    assert [body["prompt"] for body in client.bodies] == [[ord(c) for c in part] for part in ("abcd", "cdef", "efgh")]
    assert scored.logprob == (-1 - 2 - 3) + 2 * (-2 - 3)
    short = FakeClient(context=20)
    assert model(short).score_text("abc").logprob == -1 - 2
    assert [body["prompt"] for body in short.bodies] == ["abc"]
    assert model(FakeClient()).score_text("abc").logprob == -3, "a server that does not say how long its context is"


@pytest.mark.parametrize(("num", "size"), [(10, 4), (11, 4), (5, 4), (9, 2), (100, 7)])
def test_every_token_is_counted_once(num, size):
    found = windows(list(range(num)), size)
    counted = [i for ids, seen in found for i in ids[seen:]]
    assert counted == list(range(num))
    assert all(len(ids) == size for ids, _ in found)
    assert all(seen >= size // 2 for _, seen in found[1:])
    assert windows(list(range(size)), size) is None


def test_a_server_without_log_probabilities():
    with pytest.raises(RequestError, match="no log-probabilities of a prompt"):
        model(FakeClient(logprobs=False)).score("a", "b")
