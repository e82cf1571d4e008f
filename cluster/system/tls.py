"""TLS: a server's context from its two files, loaded again when they change; and the certificates that our own commands trust.

Knows PEM files and OpenSSL's errors about them; no HTTP. A certificate that is renewed in place is used for new connections. Files that
do not match (one is written before the other) change nothing until they do.
"""

import asyncio
import functools
import logging
import ssl
from pathlib import Path

from cluster.system.files import version_of
from workers.errors import ConfigError

log = logging.getLogger(__name__)

POLL_S = 5.0


class Certificate:
    """Raises ConfigError for files that cannot work. Run `run` as a task to load them again when they change."""

    def __init__(self, cert: Path, key: Path, *, poll_s: float = POLL_S) -> None:
        self._cert = cert
        self._key = key
        self._poll_s = poll_s
        self._version = self._version_now()
        self.context = load(cert, key)
        self.expires_at = expiry(cert)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._poll_s)
            version = self._version_now()
            if version == self._version:
                continue
            try:
                load(
                    self._cert, self._key
                )  # into another context first: one with only half of a pair would refuse every client
                self.context.load_cert_chain(self._cert, self._key)
                self.expires_at = expiry(self._cert)
            except (ConfigError, OSError) as e:
                log.error("The old TLS certificate stays in use: %s", e)
            else:
                log.warning("The TLS certificate was reloaded.")
            self._version = version

    def _version_now(self) -> tuple[object, ...]:
        return tuple(version_of(path) for path in (self._cert, self._key))


def open_certificate(cert: str | None, key: str | None) -> Certificate | None:
    """None without files. Raises ConfigError."""
    return None if cert is None or key is None else Certificate(Path(cert), Path(key))


def expiry(cert: Path) -> float:
    """Unix time at which the first certificate of the file ends.

    The standard library reads a file's dates in this function only; it has been there, and unchanged, since Python 2.6.
    """
    found: dict[str, str] = ssl._ssl._test_decode_cert(str(cert))  # type: ignore[attr-defined]
    return float(ssl.cert_time_to_seconds(found["notAfter"]))


def load(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context, TLS 1.2 and newer. Raises ConfigError."""
    for option, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as e:
            raise ConfigError(
                f"{option} {path} cannot be read: {e.strerror}.",
                remedy="Give a PEM file that this user can read.",
                param=option,
            ) from e
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    prompted: list[bool] = []

    def password() -> str:  # otherwise OpenSSL prompts on the terminal
        prompted.append(True)
        return ""

    try:
        context.load_cert_chain(cert, key, password=password)
    except (ssl.SSLError, ValueError, OSError) as e:
        if prompted:
            raise ConfigError(
                f"--tls-key {key} is encrypted.",
                remedy="Store it without a password, readable by this user only.",
                param="--tls-key",
            ) from e
        if getattr(e, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"--tls-key {key} is not the key of the certificate in --tls-cert {cert}.",
                remedy="Give a certificate and its own key.",
                param="--tls-key",
            ) from e
        raise ConfigError(
            f"--tls-cert {cert} and --tls-key {key} are not a certificate and a key in PEM format ({_reason(e)}).",
            remedy="Convert them to PEM.",
            param="--tls-cert",
        ) from e
    return context


def client_context(ca_cert: Path | None) -> ssl.SSLContext:
    """A client's context: trusts the system's certificates and `ca_cert`. Do not change it. Raises ConfigError."""
    if ca_cert is None:
        return _system_context()
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_cert)
    except OSError as e:  # ssl.SSLError is one
        raise ConfigError(
            f"--ca-cert {ca_cert} is not a certificate in PEM format ({_reason(e)}).",
            remedy="Give the PEM file of the certificate authority.",
            param="--ca-cert",
        ) from e
    return context


@functools.cache
def _system_context() -> ssl.SSLContext:
    """Made once: to read the system's certificates takes 20 ms."""
    return ssl.create_default_context()


def distrust(url: str, error: BaseException) -> ConfigError | None:
    """The error for a server whose certificate is not trusted; None if the connection failed for another reason."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return None
    return ConfigError(
        f"The certificate of the server at {url} is not trusted ({error.verify_message}).",
        remedy="Give the certificate that signed it with --ca-cert.",
        param="--ca-cert",
    )


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason).lower().replace("_", " ")
