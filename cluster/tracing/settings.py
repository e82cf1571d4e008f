"""From `--otlp-endpoint` and OpenTelemetry's environment variables to where spans go. A pure function; imports no OpenTelemetry."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from workers.errors import ConfigError
from workers.tracing.settings import TracingConfig

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_TRACES_PATH = "/v1/traces"
_PROTOCOL = "http/protobuf"


def tracing_config(endpoint: str | None, environ: Mapping[str, str]) -> TracingConfig | None:
    """endpoint: the option's; None: what the environment says. None where neither names a collector. Raises ConfigError."""
    found = {name: value.strip() for name, value in environ.items() if name.startswith("OTEL_") and value.strip()}
    if found.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if endpoint is None and found.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return None
    named = _named(endpoint, found)
    if named is None:
        return None
    name, url = named
    _check_url(name, url)
    _check_choices(found)
    ours = {ENDPOINT, TRACES_ENDPOINT}
    return TracingConfig(url=url, environ=tuple((k, v) for k, v in sorted(found.items()) if k not in ours))


def _named(endpoint: str | None, found: Mapping[str, str]) -> tuple[str, str] | None:
    """The address for traces, and what named it."""
    if endpoint is not None:
        has_path = urlsplit(endpoint).path.strip("/") != ""
        return "--otlp-endpoint", endpoint if has_path else endpoint.rstrip("/") + _TRACES_PATH
    if TRACES_ENDPOINT in found:
        return TRACES_ENDPOINT, found[TRACES_ENDPOINT]
    if ENDPOINT in found:
        return ENDPOINT, found[ENDPOINT].rstrip("/") + _TRACES_PATH
    return None


def _check_url(name: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{name} is not the address of a collector.",
            remedy="Write it like http://127.0.0.1:4318, the collector's port for OTLP over HTTP.",
            param="--otlp-endpoint",
        )


def _check_choices(found: Mapping[str, str]) -> None:
    """Only one exporter and one protocol are built in."""
    protocol_name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    protocol = found.get(protocol_name) or found.get("OTEL_EXPORTER_OTLP_PROTOCOL", _PROTOCOL)
    if protocol != _PROTOCOL:
        raise ConfigError(
            f"OpenTelemetry's variables ask for the protocol {protocol}, and traces are sent over {_PROTOCOL} only.",
            remedy=f"Set {protocol_name}={_PROTOCOL} and name the collector's port for it, usually 4318; or set OTEL_SDK_DISABLED=true.",
            param="--otlp-endpoint",
        )
    exporter = found.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter not in ("otlp", "none"):
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER is {exporter}, and traces are sent over OTLP only.",
            remedy="Set it to otlp, or to none.",
            param="--otlp-endpoint",
        )
