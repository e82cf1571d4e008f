"""One API key: its name, its limits, and how its secret is made and recognized.

Knows only the SHA-256 of the secret. A plain hash without salt or stretching is sufficient: secrets have 256 random bits, so they cannot be
guessed and no two are equal. Knows no file and no HTTP.
"""

import hashlib
import secrets
import time

import msgspec

from workers.errors import RequestError

SECRET_PREFIX = "tm-"
OWN_ID = "admin"  # the id of the server's own key
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


class NotAllowedError(RequestError):
    """The key is valid but does not allow the request; answered with 403."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """None means no limit. `models`: the served names that the key may use. `priority`: the highest allowed one, and the default."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    models: tuple[str, ...] | None = None
    priority: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**53:
                raise ValueError(f"{name} is {value}; it must be at least 1 (remove it for no limit)")
        if self.priority is not None and not MIN_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"priority is {self.priority}; it must be between {MIN_PRIORITY} and {MAX_PRIORITY}")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`sha256`: of the secret, in hexadecimal digits. `created`: Unix time. `admin`: may also use the endpoints for operators."""

    id: str
    name: str
    sha256: str
    created: int
    admin: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256 must be 64 hexadecimal digits in lower case")

    def may_use(self, name: str) -> bool:
        """Whether the key's models include this one, or are all."""
        return self.limits.models is None or name in self.limits.models

    def check_model(self, name: str) -> None:
        """Raises NotAllowedError if the key may not use the model."""
        models = self.limits.models
        if models is not None and not self.may_use(name):
            yours = ", ".join(repr(model) for model in models) or "none"
            raise NotAllowedError(
                f"This API key may not use the model {name!r}.",
                remedy=f"Use one of the models it allows: {yours}.",
                param="model",
                code="model_not_allowed",
            )

    def priority(self, requested: int | None) -> int:
        """The priority of a request with this key; smaller numbers run first."""
        best = self.limits.priority
        if best is None:
            return requested or 0
        return best if requested is None else max(requested, best)


def new_key(name: str, *, admin: bool = False, limits: Limits | None = None) -> tuple[ApiKey, str]:
    """The key and its secret, which is stored nowhere."""
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
    """The server's own key, from --api-key: an admin key without limits."""
    return ApiKey(id=OWN_ID, name="--api-key", sha256=digest(secret), created=0, admin=True)


def digest(secret: str) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
