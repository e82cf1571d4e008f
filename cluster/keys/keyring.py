"""Finds the key of a secret, in the newest valid version of the keys file.

Knows the server's own key and the file. A look-up reads the file again if it has changed, at most once a second. If the file becomes
unreadable or malformed, the keys stay as they were and the log says so. Knows no limits and no HTTP.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from cluster.keys.file import read_keys
from cluster.keys.key import ApiKey, NotAllowedError, admin_key, digest
from cluster.system.files import version_of
from workers.errors import ConfigError

log = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0


class Keyring:
    """path: the keys file. api_key: the server's own key, an admin key without limits. With neither, no key is needed.

    Raises ConfigError.
    """

    def __init__(
        self, path: Path | None = None, *, api_key: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._own = None if api_key is None else admin_key(api_key)
        self._clock = clock
        self._version: tuple[int, ...] | None = None
        self._by_digest: dict[str, ApiKey] = {}
        self._by_id: dict[str, ApiKey] = {}
        if path is not None:
            self._version = version_of(path)
            self._set_keys(read_keys(path))
        else:
            self._set_keys([])
        self._checked_at = clock()

    @property
    def guards(self) -> bool:
        """Whether a key is needed."""
        return self._own is not None or self._path is not None

    def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, if any.

        The time of the look-up depends on the secret's hash only. A client cannot choose a hash bit by bit, so the timing does not help to
        find a secret.
        """
        self._reload_if_changed()
        return self._by_digest.get(digest(secret))

    def get(self, key_id: str) -> ApiKey | None:
        """The key with this id, if it still exists."""
        self._reload_if_changed()
        return self._by_id.get(key_id)

    def owner(self, key_id: str, thing: str) -> ApiKey | None:
        """The key that made something some time ago; None if nobody owns it, or no key is needed here.

        Raises NotAllowedError, which names the thing, if the key was revoked.
        """
        if not key_id or not self.guards:
            return None
        key = self.get(key_id)
        if key is None:
            raise NotAllowedError(f"The API key that made this {thing} is no longer valid.", code="api_key_revoked")
        return key

    def _reload_if_changed(self) -> None:
        now = self._clock()
        if self._path is None or now - self._checked_at < RELOAD_INTERVAL_S:
            return
        self._checked_at = now
        version = version_of(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            keys = read_keys(self._path)
        except ConfigError as e:
            log.error("The API keys are unchanged: %s", e)
            return
        self._set_keys(keys)
        log.warning("The API keys were reloaded: %d key%s.", len(keys), "s" * (len(keys) != 1))

    def _set_keys(self, keys: list[ApiKey]) -> None:
        self._by_digest = {key.sha256: key for key in keys}
        if self._own is not None:
            self._by_digest[self._own.sha256] = self._own
        self._by_id = {key.id: key for key in self._by_digest.values()}
