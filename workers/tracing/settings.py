"""Where spans go. One frozen value that the command makes and that gateways and ranks get; it knows no OpenTelemetry."""

from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit, urlunsplit


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """`url`: where the collector takes traces over OTLP/HTTP. `environ`: the OTEL_* variables of the command; both may hold keys."""

    url: str = field(repr=False)
    environ: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def shown_url(self) -> str:
        """Without a password and a query."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def for_display(self) -> "TracingConfig":
        """Without what may be secret."""
        return replace(self, url=self.shown_url, environ=())
