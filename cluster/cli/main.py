"""The command `tramontane`: runs one command of the option table, and turns errors into a message on stderr and an exit code.

0 done, or stopped by Ctrl-C or SIGTERM    1 something failed    2 an option cannot work
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cluster.cli.options.parser import parse
from cluster.system.log import setup_logging
from workers.errors import ConfigError, TramontaneError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parse(argv)
    setup_logging(
        args.log_level, format=getattr(args, "log_format", "text"), prompts=getattr(args, "log_prompts", False)
    )
    try:
        function(args.run.run)(args)
    except TramontaneError as e:
        if args.log_level == "debug":
            logging.getLogger(__name__).exception("failed")
        print("\n".join([f"tramontane: {e}", *getattr(e, "__notes__", ())]), file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
    return 0


def function(path: str) -> Callable[[Any], None]:
    """`module:function`, imported now: no command pays for the imports of another."""
    module, _, name = path.partition(":")
    found: Callable[[Any], None] = getattr(importlib.import_module(module), name)
    return found


if __name__ == "__main__":
    sys.exit(main())
