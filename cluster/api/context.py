"""What every handler of one application shares: the router, the tokenizer and the names it serves under.

Knows no endpoint. Lives in the application under GATEWAY, so that two applications in one process share nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from cluster.api.generation.structured import Grammars
from cluster.api.server import limits
from cluster.api.server.errors import ModelNotFoundError
from cluster.batch.files import FileContents
from cluster.batch.store.interface import Store
from cluster.metrics.gateway import Metrics
from cluster.router.router import Router
from cluster.text.chat.template import ChatTemplate
from cluster.text.tokenizer import Tokenizer

NO_BATCHES = "This server was started without batches (--no-batches)."


class Admin(Protocol):
    """What a gateway lets an operator do with the whole cluster."""

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        """Nothing new goes there, and what runs has `grace_s` to finish before it moves. Raises RequestError if it is unknown."""

    def cluster_view(self) -> object:
        """What is, as a value that JSON can carry, without secrets."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What an application needs to take batches. `wake`: there is something to do, or to stop doing."""

    store: Store
    files: FileContents
    wake: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Gateway:
    router: Router
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    model_names: tuple[str, ...]
    max_sequences_per_request: int
    metrics: Metrics
    keep_alive_s: float  # how long a stream stays silent
    body_timeout_s: float  # how long a body may take to arrive, or each piece of a long one
    grammars: Grammars
    serves_embeddings: bool = True
    admin: Admin | None = None
    batches: Batches | None = None
    no_batches: str = NO_BATCHES  # what is said where they are None
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError unless `name` is served here, NotAllowedError unless the request's key may use it."""
        if name not in self.model_names:
            served = ", ".join(repr(n) for n in self.model_names)
            raise ModelNotFoundError(
                f"The model {name!r} does not exist; this server serves {served}.",
                param="model",
                code="model_not_found",
            )
        limits.check_model(name)


GATEWAY = web.AppKey("gateway", Gateway)
