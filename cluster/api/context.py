"""What all handlers of one application share: the served models, and which of them a request goes to.

Stored in the application under CONTEXT, so two applications in one process share nothing. Knows no endpoint; what belongs to a single
request is in request_context.py.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from aiohttp import web

from cluster.adapters.served import ServedAdapters
from cluster.api.generation.structured import Grammars
from cluster.api.request_context import RequestContext
from cluster.api.served_model import ServedModel, find_model
from cluster.api.server.errors import ModelNotFoundError
from cluster.api.stored.service import ResponseService
from cluster.batch.files import FileContents
from cluster.batch.store.interface import Store
from cluster.config.sampling_defaults import SamplingDefaults
from cluster.metrics.gateway import Metrics
from cluster.protocol.adapters import AdapterChange, AdapterRevision, Registry
from cluster.router.router import Router
from cluster.system.log import request_id_var
from cluster.text.chat.template import ChatTemplate
from cluster.text.tokenizer import Tokenizer
from cluster.tracing.request import GatewayTracing
from workers.errors import ReplicaUnavailableError, RequestError

FIRST_LOAD_TIMEOUT_S = 300.0
NO_BATCHES = "Batches are disabled on this server (--no-batches)."


class Admin(Protocol):
    """What an operator can do with the whole cluster through this gateway."""

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        """Stops sending requests to the replica; running ones have `grace_s` to finish before they move elsewhere.

        Raises RequestError if there is no such replica.
        """

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        share: float | None = None,
        in_place: bool = False,
        base_model: str | None = None,
    ) -> AdapterRevision:
        """Returns the revision when every replica has it. base_model: the served model that it belongs to, where there are several.

        Raises RequestError for what is refused.
        """

    async def change_adapter(self, change: AdapterChange, name: str) -> Registry:
        """Promotes, rolls back or unloads an adapter. Raises RequestError for what is refused."""

    def cluster_view(self) -> object:
        """The current state of the cluster, as a value that JSON can represent, without secrets."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What an application needs to accept batches. Call `wake` after a batch was added or cancelled.

    `responses`: the stored responses, which are in the same store; None where responses are not stored.
    """

    store: Store
    files: FileContents
    wake: Callable[[], None]
    responses: ResponseService | None = None


@dataclass(frozen=True, kw_only=True)
class ApiContext:
    """`models`: all that are served; the first is the default. `model`: the one that the request goes to. Handlers call `serving` as soon
    as they know the name that a request asks for.

    `keep_alive_s`: longest silence in a stream. `body_timeout_s`: time for a body to arrive, or for each piece of an upload.

    `no_batches`: the error message for files and batches when `batches` is None. `strict`: fields of a body without effect are refused.
    `public_health`: who asks for readiness without a key learns no more than that. `links`: name -> address, for operators.
    `tracing`: None where nothing is traced.
    """

    models: tuple[ServedModel, ...]
    model: ServedModel
    max_sequences_per_request: int
    keep_alive_s: float
    body_timeout_s: float
    serves_embeddings: bool = True
    strict: bool = False
    public_health: bool = False
    links: Mapping[str, str] = field(default_factory=dict)
    admin: Admin | None = None
    batches: Batches | None = None
    no_batches: str = NO_BATCHES
    tracing: GatewayTracing | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def serving(self, name: str | None) -> "ApiContext":
        """This, for the model that has this name; as it is for None, and for a name that none has, which `check_model` refuses."""
        if name is None or len(self.models) == 1:
            return self
        model = find_model(self.models, name)
        return self if model is None or model is self.model else replace(self, model=model)

    @property
    def router(self) -> Router:
        return self.model.router

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self.model.chat_template

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of `model`, without its adapters."""
        return self.model.names

    @property
    def metrics(self) -> Metrics:
        return self.model.metrics

    @property
    def grammars(self) -> Grammars:
        return self.model.grammars

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return self.model.sampling_defaults

    @property
    def adapters(self) -> ServedAdapters:
        return self.model.adapters

    def check_model(self, name: str, context: RequestContext) -> None:
        """Raises ModelNotFoundError if `name` is not served here, NotAllowedError if the request's API key may not use it."""
        adapters = self.adapters
        if not self.model.serves(name):
            known = [one for model in self.models for one in (*model.names, *model.adapters.names)]
            served = " or ".join(repr(one) for one in known if context.may_use(one))
            raise ModelNotFoundError(
                adapters.why_not(name) or f"The model {name!r} does not exist.",
                remedy=f"Use {served}." if served else "The API key may use none that is served here.",
                param="model",
                code="model_not_found",
            )
        context.check_model(name if name in self.model_names else adapters.adapter_of(name))

    async def use_model(self, name: str, context: RequestContext) -> str | None:
        """The adapter revision that the request uses until its end, as `GenerateRequest.adapter`; None for the model itself.

        Waits for an adapter that the server was started with and that is not loaded yet. Raises as `check_model`.
        """
        if name in self.model_names:
            return None
        adapters = self.adapters
        await adapters.until(lambda _: not adapters.is_first_load(name), timeout_s=FIRST_LOAD_TIMEOUT_S)
        self.check_model(name, context)
        # Some of a client's own retries have the id of its first try.
        revision = adapters.resolve(name, request_id_var.get() or uuid.uuid4().hex)
        if revision is None:
            raise ReplicaUnavailableError(adapters.why_not(name) or "", remedy="Try again in a moment.")
        context.use_adapter(revision, adapters.using(revision))
        return revision

    def ignore(self, context: RequestContext, **fields: object) -> None:
        """Notes those of a body's fields that were sent, which means not None, but can have no effect in this request.

        Raises RequestError if the server is strict.
        """
        for path, value in fields.items():
            if value is None:
                continue
            if self.strict:
                raise RequestError(
                    f"{path!r} has no effect in this request, and this server refuses such fields (--strict).",
                    remedy="Remove it.",
                    param=path.partition(".")[0].partition("[")[0],
                    code="unsupported_parameter",
                )
            context.ignore(path)


CONTEXT = web.AppKey("context", ApiContext)
