"""Log lines of a rank that say which trace they belong to: `log.error(..., extra=in_trace(traceparent))`."""

import logging


def in_trace(traceparent: str | None) -> dict[str, str | None]:
    """The `extra` of a line about a request. traceparent: None for one that is not traced."""
    return {"traceparent": traceparent}


class TraceFormatter(logging.Formatter):
    """Adds the ids at the end of a line that has them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        text = super().formatMessage(record)
        traceparent: str | None = getattr(record, "traceparent", None)
        if traceparent is None:
            return text
        _, trace_id, span_id, _ = traceparent.split("-")
        return f"{text} [trace_id={trace_id} span_id={span_id}]"
