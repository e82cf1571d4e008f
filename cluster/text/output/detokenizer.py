"""Turns token ids into text as they arrive: each `push` returns only text that no later token can change.

However the ids are split, the result equals the decode of all ids at once by the library that reads the tokenizer's file. The space that
opens a text is dropped once, where the vocabulary has such a space. Bytes that form no UTF-8 character become U+FFFD: each of them in
SentencePiece, each longest beginning of a character in a byte-level vocabulary. Control tokens add nothing; whether bytes on both sides of
one may form a character, the table of pieces says. Knows one sequence. Does not know tokenizer files or stop strings.

Worked example, byte tokens of "é" (C3 A9) split over two steps: push([C3]) -> "", push([A9]) -> "é", flush() -> "".
"""

from collections.abc import Iterable, Sequence

from workers.tokenizer_files.pieces import PieceTable

_REPLACEMENT = "�"


class Detokenizer:
    """Incremental decoder, O(1) per token.

    continues: the ids before the output. For a completion the prompt, so that the text is decode(prompt + output) without
    decode(prompt). For a chat answer nothing, so that it starts without a space. A character started by the last bytes of `continues` is
    returned whole when the output completes it.
    """

    def __init__(self, pieces: PieceTable, *, continues: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._at_start = True  # the next leading space opens the text and is dropped
        self._pending = bytearray()  # a proper prefix of a UTF-8 character
        self._num_foreign = 0  # how many of the pending bytes came from `continues`
        self.num_chars = 0  # returned so far
        self._start_after(continues)

    def _start_after(self, token_ids: Sequence[int]) -> None:
        self._at_start, size = self._pieces.opens_text(token_ids), len(self._pieces.partial)
        run: list[bytes] = []
        for token_id in reversed(token_ids):
            if not 0 <= token_id < size or self._is_transparent(token_id):
                continue
            part = self._pieces.partial[token_id]
            if part is None or len(run) == 3:  # an unfinished character has at most three bytes
                break
            run.insert(0, part)
        for part in run:
            self._push_bytes(part)
        self._num_foreign = len(self._pending)
        self.num_chars = 0

    def _is_transparent(self, token_id: int) -> bool:
        return self._pieces.control_joins and self._pieces.is_control[token_id]

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is final after these tokens."""
        return "".join([self.push_token(token_id)[1] for token_id in token_ids])

    def push_token(self, token_id: int) -> tuple[int, str]:
        """Where the token's own text starts, in characters of the output, and the text that is final after it."""
        pieces = self._pieces
        # The model's vocabulary may be padded beyond the tokenizer's.
        if not 0 <= token_id < len(pieces.surfaces) or self._is_transparent(token_id):
            return self.num_chars, ""
        part = pieces.partial[token_id]
        if part is not None:
            offset = self.num_chars
            text = self._push_bytes(part)
            self._at_start = False
            self.num_chars += len(text)
            return offset, text
        final = self._drop_pending() if self._pending else ""
        offset = self.num_chars + len(final)
        surface = pieces.surfaces[token_id]
        if self._at_start and not pieces.is_control[token_id]:
            self._at_start = False
            if pieces.starts_with_space[token_id]:
                surface = surface[1:]
        self.num_chars = offset + len(surface)
        return offset, final + surface

    def flush(self) -> str:
        """The rest, when no token follows: bytes of an unfinished character become U+FFFD."""
        text = self._drop_pending()
        self.num_chars += len(text)
        return text

    def _push_bytes(self, part: bytes) -> str:
        return "".join([self._push_byte(byte) for byte in part])

    def _push_byte(self, byte: int) -> str:
        pending = self._pending
        pending.append(byte)
        if _may_continue(pending):
            return ""
        try:
            text = pending.decode()
        except UnicodeDecodeError:
            # Only the newest byte can be the cause: the bytes before it were the prefix of a character.
            pending.pop()
            text = self._drop_pending()
            if _may_continue(bytes((byte,))):
                pending.append(byte)
                return text
            return text + (chr(byte) if byte < 0x80 else _REPLACEMENT)
        pending.clear()
        self._num_foreign = 0
        return text

    def _drop_pending(self) -> str:
        num = len(self._pending) - self._num_foreign
        if self._pieces.byte_level:  # one for all of them, which belongs to `continues` if that began the character
            num = 1 if self._pending and not self._num_foreign else 0
        text = _REPLACEMENT * num
        self._pending.clear()
        self._num_foreign = 0
        return text


def _may_continue(prefix: bytes | bytearray) -> bool:
    """Whether these bytes are an incomplete prefix of a UTF-8 character."""
    lead = prefix[0]
    if 0xC2 <= lead <= 0xDF:
        return len(prefix) < 2
    if 0xE0 <= lead <= 0xEF:
        # E0 80..9F would be overlong, ED A0..BF a surrogate.
        low, high, length = (0xA0 if lead == 0xE0 else 0x80), (0x9F if lead == 0xED else 0xBF), 3
    elif 0xF0 <= lead <= 0xF4:
        # F0 80..8F would be overlong, F4 90..BF beyond U+10FFFF.
        low, high, length = (0x90 if lead == 0xF0 else 0x80), (0x8F if lead == 0xF4 else 0xBF), 4
    else:
        return False
    if len(prefix) >= length or (len(prefix) > 1 and not low <= prefix[1] <= high):
        return False
    return all(0x80 <= b <= 0xBF for b in prefix[2:])
