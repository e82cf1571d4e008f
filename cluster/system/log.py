"""Sets up logging for a control-plane process: on stderr, our own loggers at the chosen level and all others at warnings.

Text for people, or one JSON object per line for machines; both carry the id of the request that is being served, if there is one, and the
ids of its trace, if it is traced. Knows no HTTP: the code that serves a request sets `request_id_var` and `trace_ids_var`, and the tasks it
starts inherit them. Prompts are logged on request only, and only through `log_prompt`.
"""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

import msgspec

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)


class TraceIds(NamedTuple):
    """A span, in hexadecimal digits as tracing tools show them."""

    trace_id: str
    span_id: str


request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
trace_ids_var: ContextVar[TraceIds | None] = ContextVar("trace_ids", default=None)

_prompts = logging.getLogger("cluster.prompts")
_prompts.setLevel(logging.CRITICAL)  # a level that is never used: off until `setup_logging` turns it on


def log_prompt(prompt: object) -> None:
    """Text, token ids or messages, at info; not logged without --log-prompts."""
    _prompts.info("Prompt: %r", prompt)


def setup_logging(
    level: LogLevel,
    *,
    format: LogFormat = "text",  # noqa: A002  # logging's own word
    prompts: bool = False,
) -> None:
    """prompts: whether `log_prompt` writes, whatever the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for name in ("cluster", "workers"):
        logging.getLogger(name).setLevel(level.upper())
    _prompts.setLevel(logging.INFO if prompts else logging.CRITICAL)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        text = super().formatMessage(record)
        request_id = request_id_var.get()
        if request_id is not None:
            text = f"{text} [{request_id}]"
        ids = trace_ids_var.get()
        return text if ids is None else f"{text} [trace_id={ids.trace_id} span_id={ids.span_id}]"


class JsonFormatter(logging.Formatter):
    """ts (UTC, RFC 3339), level, logger, message; request_id, trace_id, span_id and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": ts.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _printable(record.getMessage()),
        }
        if (request_id := request_id_var.get()) is not None:
            line["request_id"] = request_id
        if (ids := trace_ids_var.get()) is not None:
            line |= ids._asdict()
        if record.exc_info:
            line["exception"] = _printable(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()


def _printable(text: str) -> str:
    """Without lone surrogates, which a client's path may contain and JSON must not."""
    return text.encode(errors="backslashreplace").decode()
