"""One API key: who it is, what it may do, and how its secret is made and recognized.

Knows the secret only as its SHA-256. A plain hash suffices, without salt or stretching: secrets are 256 random bits, so there is nothing
to guess and no two are alike. Knows no file and no HTTP.
"""

import hashlib
import secrets
import time

import msgspec

from workers.errors import RequestError

SECRET_PREFIX = "tm-"
OWN_ID = "admin"  # of the server's own key
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


class NotAllowedError(RequestError):
    """The key is good, but what it asks for is not its to have; answered with 403."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """None: without limit. `models`: the served names the key may use. `priority`: the best one, and the default, of its requests."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    models: tuple[str, ...] | None = None
    priority: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**53:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out for no limit")
        if self.priority is not None and not MIN_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"priority is {self.priority}; it must lie between {MIN_PRIORITY} and {MAX_PRIORITY}")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`sha256`: of the secret, in hexadecimal digits. `created`: seconds since 1970. `admin`: may also use what operators use."""

    id: str
    name: str
    sha256: str
    created: int
    admin: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256 must be 64 hexadecimal digits in lower case")

    def check_model(self, name: str) -> None:
        """Raises NotAllowedError for a model that is not this key's."""
        models = self.limits.models
        if models is not None and name not in models:
            yours = ", ".join(repr(model) for model in models) or "none"
            raise NotAllowedError(
                f"This API key may not use the model {name!r}; it may use {yours}.",
                param="model",
                code="model_not_allowed",
            )

    def priority(self, asked: int | None) -> int:
        """What a request of this key gets; smaller is served first."""
        best = self.limits.priority
        if best is None:
            return asked or 0
        return best if asked is None else max(asked, best)


def new_key(name: str, *, admin: bool = False, limits: Limits | None = None) -> tuple[ApiKey, str]:
    """The key and its secret, which is nowhere else."""
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=f"key-{secrets.token_hex(4)}",
        name=name,
        sha256=digest(secret),
        created=int(time.time()),
        admin=admin,
        limits=limits or Limits(),
    )
    return key, secret


def admin_key(secret: str) -> ApiKey:
    """The server's own key, of --api-key: may do everything."""
    return ApiKey(id=OWN_ID, name="--api-key", sha256=digest(secret), created=0, admin=True)


def digest(secret: str) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
