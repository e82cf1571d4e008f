"""One model as requests see it: its names and adapters, its text, and the router to its replicas.

A gateway serves one of these, or several at the same endpoints. Knows which names are its own; what all of them share is in
context.py.
"""

from dataclasses import dataclass, field

from cluster.adapters.registry import find_revision
from cluster.adapters.served import ServedAdapters
from cluster.api.generation.structured import Grammars
from cluster.config.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from cluster.metrics.gateway import Metrics
from cluster.router.router import Router
from cluster.text.chat.template import ChatTemplate
from cluster.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """`names`: of the model itself; the first is the default. `deployment`: its name among several; None for the only one.

    `chat_template`: None for a model that cannot chat. `sampling_defaults`: for what a request does not say.
    """

    names: tuple[str, ...]
    router: Router
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    metrics: Metrics
    grammars: Grammars
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    deployment: str | None = None

    def __post_init__(self) -> None:
        assert self.names, "a served model needs at least one name"

    def serves(self, name: str) -> bool:
        """Whether requests can name it, now or once an adapter that the server starts with is loaded."""
        return name in self.names or self.adapters.knows(name) or self.adapters.is_first_load(name)

    def knows(self, name: str) -> bool:
        """Whether it belongs here, even if it does not serve: an adapter that could not be loaded, or that is being unloaded."""
        return self.serves(name) or bool(
            self.adapters.why_not(name) or find_revision(self.adapters.registry, name) is not None
        )


def find_model(models: tuple[ServedModel, ...], name: str) -> ServedModel | None:
    """The model that serves this name, or else one that knows it."""
    return next((m for m in models if m.serves(name)), None) or next((m for m in models if m.knows(name)), None)
