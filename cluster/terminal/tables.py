"""How commands print results to stdout: tables without lines, as wide as the terminal. Knows nothing about their content."""

import sys

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160  # columns where stdout is not a terminal


def answer_console(*, plain_width: int = PLAIN_WIDTH) -> Console:
    """Prints text as it is: brackets in a model's name are not markup."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else plain_width)


def plain_table() -> Table:
    """Without columns yet."""
    return Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold underline")
