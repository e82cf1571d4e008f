"""TLS: the server's two files become a context, which follows them when they change; and what our own commands trust.

Knows PEM files and OpenSSL's complaints about them; no HTTP. A certificate that is renewed in place is used for connections from then
on; files that do not fit each other (one is written before the other) change nothing until they do.
"""

import asyncio
import logging
import ssl
from pathlib import Path

from cluster.system.files import version_of
from workers.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 5.0


class Certificate:
    """Raises ConfigError for files that cannot work. `run` as a task follows them."""

    def __init__(self, cert: Path, key: Path, *, look_again_s: float = LOOK_AGAIN_S) -> None:
        self._cert = cert
        self._key = key
        self._look_again_s = look_again_s
        self._version = self._version_now()
        self.context = load(cert, key)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._look_again_s)
            version = self._version_now()
            if version == self._version:
                continue
            try:
                load(self._cert, self._key)  # elsewhere first: a context that takes only half of a pair serves nobody
                self.context.load_cert_chain(self._cert, self._key)
            except (ConfigError, OSError) as e:
                log.error("The TLS certificate stays as it was: %s", e)
            else:
                log.warning("The TLS certificate was read again.")
            self._version = version

    def _version_now(self) -> tuple[object, ...]:
        return tuple(version_of(path) for path in (self._cert, self._key))


def open_certificate(cert: str | None, key: str | None) -> Certificate | None:
    """None without files. Raises ConfigError."""
    return None if cert is None or key is None else Certificate(Path(cert), Path(key))


def load(cert: Path, key: Path) -> ssl.SSLContext:
    """For servers, TLS 1.2 and newer. Raises ConfigError in a sentence."""
    for option, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as e:
            raise ConfigError(f"{option} {path} cannot be read: {e.strerror}.") from e
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    asked: list[bool] = []

    def password() -> str:  # else OpenSSL asks at the terminal
        asked.append(True)
        return ""

    try:
        context.load_cert_chain(cert, key, password=password)
    except (ssl.SSLError, ValueError, OSError) as e:
        if asked:
            raise ConfigError(
                f"--tls-key {key} is encrypted; store it without a password, readable by this user only."
            ) from e
        if getattr(e, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key {key} is not the key of the certificate in --tls-cert {cert}.") from e
        raise ConfigError(
            f"--tls-cert {cert} and --tls-key {key} are no certificate and key in PEM format ({_reason(e)})."
        ) from e
    return context


def client_context(ca_cert: Path | None) -> ssl.SSLContext:
    """Trusts what the system trusts, and `ca_cert`. Raises ConfigError."""
    context = ssl.create_default_context()
    if ca_cert is not None:
        try:
            context.load_verify_locations(ca_cert)
        except OSError as e:  # ssl.SSLError is one
            raise ConfigError(f"--ca-cert {ca_cert} is no certificate in PEM format ({_reason(e)}).") from e
    return context


def distrust(url: str, error: Exception) -> ConfigError | None:
    """What to say when a request failed because the server's certificate is not trusted; None if that is not why."""
    cause = getattr(error, "reason", error)
    if not isinstance(cause, ssl.SSLCertVerificationError):
        return None
    return ConfigError(
        f"The certificate of the server at {url} is not trusted ({cause.verify_message}); name the one that signed it with --ca-cert."
    )


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason).lower().replace("_", " ")
