"""Which key a secret belongs to, by the newest good version of the keys' file.

Knows the server's own key and the file, which is looked at again when it changes, at most once a second, when somebody asks. A file
that becomes unreadable or broken changes nothing but the log. Knows no limits and no HTTP.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from cluster.keys.file import read_keys
from cluster.keys.key import ApiKey, admin_key, digest
from cluster.system.files import version_of
from workers.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0


class Keyring:
    """api_key: the server's own, an admin without limits. path: of the file. With neither, nobody needs a key. Raises ConfigError."""

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
            self._take(read_keys(path))
        else:
            self._take([])
        self._looked = clock()

    @property
    def guards(self) -> bool:
        """Whether a key is needed at all."""
        return self._own is not None or self._path is not None

    def find(self, secret: str) -> ApiKey | None:
        """The key of this secret, if there is one.

        The look-up's time depends on the secret's hash only, and nobody can choose that bit by bit: what it tells about the hashes
        beside it brings no secret nearer.
        """
        self._look_again()
        return self._by_digest.get(digest(secret))

    def get(self, key_id: str) -> ApiKey | None:
        """The key of this id, if there still is one."""
        self._look_again()
        return self._by_id.get(key_id)

    def _look_again(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked < LOOK_AGAIN_S:
            return
        self._looked = now
        version = version_of(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            keys = read_keys(self._path)
        except ConfigError as e:
            log.error("The API keys stay as they were: %s", e)
            return
        self._take(keys)
        log.warning("The API keys were read again: there are %d now.", len(keys))

    def _take(self, keys: list[ApiKey]) -> None:
        self._by_digest = {key.sha256: key for key in keys}
        if self._own is not None:
            self._by_digest[self._own.sha256] = self._own
        self._by_id = {key.id: key for key in self._by_digest.values()}
