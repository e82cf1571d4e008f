"""Sets up logging for the gateway process: one format, on stderr, our own loggers at the chosen level and the rest at warnings."""

import logging
import sys
from typing import Literal, get_args

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)


def setup_logging(level: LogLevel) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for name in ("cluster", "workers"):
        logging.getLogger(name).setLevel(level.upper())
