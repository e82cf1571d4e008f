"""The adapters of a deployment, as the controller keeps them and gateways and commands read them.

Frozen, picklable values without behaviour: cluster/adapters has the transitions. A revision's id, NAME@DIGEST, is what requests carry
from the gateway on, so that a stream, its prefix cache and its failover belong to one content.
"""

import enum
from dataclasses import dataclass
from typing import Literal

AdapterChange = Literal["promote", "rollback", "unload"]
HOW_TO_ENABLE = (
    "Start the server with --enable-lora, or with --lora NAME=PATH; a model of a file needs `enable-lora: true` there."
)


def no_adapters(model: str) -> str:
    return f"The model '{model}' is served without adapters."


class RevisionState(enum.StrEnum):
    """LOADING: not all replicas have it. READY: all have it. RETIRING: gets no new requests, and leaves when its streams have ended.

    FAILED: it could not be loaded; no replica has it. It stays listed until its name is loaded again or unloaded.
    """

    LOADING = "loading"
    READY = "ready"
    RETIRING = "retiring"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class AdapterRevision:
    """One content of an adapter. `source`: the folder or Hub id it was copied from. `digest`: of its two files.

    `share`: while LOADING, the share of new requests that it will get as a canary; None: it will be the current revision.
    """

    id: str
    name: str
    source: str
    digest: str
    rank: int
    num_bytes: int
    state: RevisionState = RevisionState.LOADING
    share: float | None = None
    reason: str | None = None  # of FAILED
    loaded_at: float | None = None  # time.time() when it became READY


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What requests for a name get: the canary for `canary_share` of them, otherwise `current`. All are ids of revisions.

    `current` is None until the first revision is loaded. `previous` stays loaded, so that a rollback is immediate.
    """

    name: str
    current: str | None = None
    canary: str | None = None
    canary_share: float = 0.0
    previous: str | None = None


@dataclass(frozen=True, kw_only=True)
class Registry:
    """All adapters and revisions of a deployment, in the order of their first load."""

    adapters: tuple[Adapter, ...] = ()
    revisions: tuple[AdapterRevision, ...] = ()


NO_REGISTRY = Registry()
