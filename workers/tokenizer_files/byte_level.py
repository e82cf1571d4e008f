"""How byte-level vocabularies write bytes as characters, since GPT-2: b" the" is "Ġthe". Knows this one table."""


def _alphabet() -> dict[int, str]:
    """Printable bytes are the character of that number; the others, in order, the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


CHAR_OF = _alphabet()
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}


def to_bytes(name: str) -> bytes:
    """The bytes of a token of such a vocabulary. A name with characters of no byte is plain text, as `tokenizers` decodes it."""
    try:
        return bytes([BYTE_OF[char] for char in name])
    except KeyError:
        return name.encode()
