"""Writes the bytes of a SentencePiece model (BPE) from its pieces, as GGUF files list them.

Knows the few fields of SentencePiece's ModelProto that encoding needs. The package's own classes for it need a newer protobuf than others
here allow.
"""

import struct
from collections.abc import Sequence

_BPE = 2


def sentencepiece_proto(
    pieces: Sequence[tuple[str, float, int]], *, unk_id: int, has_bytes: bool, adds_first_space: bool
) -> bytes:
    """pieces: name, score and type of each token, in the order of their ids. Text is not normalized, except for a first space."""
    written = [
        _message(1, _text(1, name) + _float(2, score) + _number(3, piece_type)) for name, score, piece_type in pieces
    ]
    trainer = _number(3, _BPE) + _number(35, has_bytes) + _number(40, unk_id) + _text(45, pieces[unk_id][0])
    normalizer = _text(1, "identity") + _number(3, adds_first_space) + _number(4, False) + _number(5, True)
    return b"".join([*written, _message(2, trainer), _message(3, normalizer)])


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
