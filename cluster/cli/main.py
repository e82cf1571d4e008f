"""The command `tramontane`: runs one command of the option table, and turns errors into a message on stderr and an exit code.

0 done, or stopped by Ctrl-C or SIGTERM    1 something failed    2 an option cannot work
"""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cluster.cli.serve.platform import parse_here
from cluster.system.log import setup_logging
from workers.errors import ConfigError, TramontaneError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. Without `argv` the process's own arguments, for which it may start itself again."""
    if argv is None:
        _use_utf8()
    for argument in sys.argv[1:] if argv is None else argv:
        if not _is_text(argument):
            shown = os.fsencode(argument).decode(errors="backslashreplace")
            print(f"tramontane: The argument {shown} is not valid UTF-8. Rename the file or folder.", file=sys.stderr)
            return 2
    try:
        args = parse_here(sys.argv[1:] if argv is None else argv)
    except ConfigError as e:  # what the hosting platform gives cannot work
        print(f"tramontane: {e}", file=sys.stderr)
        return 2
    setup_logging(
        args.log_level, format=getattr(args, "log_format", "text"), prompts=getattr(args, "log_prompts", False)
    )
    try:
        function(args.run.run)(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has enough, as `head` has. Without this, Python writes the rest at exit and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except TramontaneError as e:
        if args.log_level == "debug":
            logging.getLogger(__name__).exception("failed")
        print("\n".join([f"tramontane: {e}", *getattr(e, "__notes__", ())]), file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
    return 0


def _use_utf8() -> None:
    """Starts this process again in Python's UTF-8 mode where the locale says ASCII or Latin-1: names of files are UTF-8 everywhere else.

    The processes that this one starts inherit the mode.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def function(path: str) -> Callable[[Any], None]:
    """`module:function`, imported now: no command pays for the imports of another."""
    module, _, name = path.partition(":")
    found: Callable[[Any], None] = getattr(importlib.import_module(module), name)
    return found


if __name__ == "__main__":
    sys.exit(main())
