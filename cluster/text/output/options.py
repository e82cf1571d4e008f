"""How the tokens of one sequence become what the client sees, as a value: it can be stored, and another gateway can go on with it.

Knows OutputText's parameters; they are explained there.
"""

from collections.abc import Sequence

import msgspec

from cluster.text.output.output_text import OutputText
from cluster.text.tokenizer import Tokenizer


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    continues: Sequence[int] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    tool_calls_token_id: int | None = None
    call_tags: bool = False
    shows_end: bool = False
    shows_special: bool = False
    reads_thoughts: bool = False

    def open(self, tokenizer: Tokenizer) -> OutputText:
        """A new output with these options."""
        return OutputText(tokenizer, **msgspec.structs.asdict(self))


DEFAULT_OPTIONS = OutputOptions()
