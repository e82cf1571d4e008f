"""What an evaluation asks of a model and of a judge. Knows no server: cluster/cli/eval/served_model.py has one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.eval.suite import Item


@dataclass(frozen=True, kw_only=True)
class Generated:
    text: str
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A given text after a given context. logprob: in nats, summed over its tokens. is_greedy: each token was the likeliest there."""

    logprob: float
    is_greedy: bool = False
    prompt_tokens: int = 0


class Model(Protocol):
    """One model on one server. Methods may run in several threads; they raise ReplicaUnavailableError where a later attempt may succeed,
    and RequestError for what the server refuses. settings: what changes its answers.
    """

    name: str
    settings: object

    def generate(self, item: Item) -> Generated: ...

    def logprob(self, item: Item, option: str) -> Scored:
        """Of the option's text after the item's question."""
        ...


class TextModel(Protocol):
    """A model without a conversation around it, for tasks that bring whole prompts. See `Model`."""

    name: str
    settings: object

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str], seed: int, fields: Mapping[str, Any]
    ) -> Generated: ...

    def score(self, context: str, continuation: str) -> Scored: ...

    def score_text(self, text: str) -> Scored:
        """Of the whole text, however long it is."""
        ...


class Judge(Protocol):
    """settings: what changes its verdicts."""

    settings: object

    def verdict(self, item: Item, question: str, answer: str) -> bool: ...
