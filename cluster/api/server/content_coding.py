"""Decodes a request's body by its Content-Encoding: gzip, deflate, zstd, or two of them one after the other.

Decoding stops at the limit on bodies, so a small body that would become a large one costs no more than an ordinary large body. Pure: bytes
in, bytes out. Knows no request.
"""

import sys
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from cluster.api.server.errors import HTTPError

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:  # no build for this platform: zstd is then not among the supported codings
    _zstd: Any = None
else:
    _zstd = zstd

MAX_CODINGS = 2
MAX_FRAMES = 100  # gzip and zstd bodies may be several streams one after the other, each of which costs a little even if it is empty
ZSTD_WINDOW_LOG = 23  # 8 MiB, the most that RFC 9659 allows in HTTP; a decoder needs that much memory
_CHUNK_BYTES = 64 * 1024


class Decoder(Protocol):
    """One stream, as zlib and zstd decode it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


def _gzip(first: bytes) -> Decoder:
    return zlib.decompressobj(wbits=31)


def _deflate(first: bytes) -> Decoder:
    """The name means zlib's format. Some clients send a bare deflate stream instead, which lacks the two bytes of zlib's header."""
    has_header = len(first) >= 2 and first[0] & 0x0F == 8 and int.from_bytes(first[:2], "big") % 31 == 0
    return zlib.decompressobj(wbits=15 if has_header else -15)


def _zstandard(first: bytes) -> Decoder:
    decoder: Decoder = _zstd.ZstdDecompressor(options={_zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})
    return decoder


# In the order of Accept-Encoding in an answer with 415.
_DECODERS: dict[str, Callable[[bytes], Decoder]] = {"gzip": _gzip, "deflate": _deflate}
_DAMAGED: tuple[type[Exception], ...] = (zlib.error, EOFError)
if _zstd is not None:
    _DECODERS["zstd"] = _zstandard
    _DAMAGED += (_zstd.ZstdError,)
_ALIASES = {"x-gzip": "gzip"}
SUPPORTED = tuple(_DECODERS)


def parse_codings(header: str) -> tuple[str, ...]:
    """The codings in the order in which they were applied, without `identity`. Raises HTTPError for one that is not supported."""
    names = [name.strip().lower() for name in header.split(",")]
    codings = tuple(_ALIASES.get(name, name) for name in names if name not in ("", "identity"))
    if any(coding not in _DECODERS for coding in codings):
        raise unsupported("The body's Content-Encoding is not supported.", SUPPORTED)
    if len(codings) > MAX_CODINGS:
        raise unsupported(f"The body has more than {MAX_CODINGS} codings.", SUPPORTED)
    return codings


def unsupported(message: str, supported: tuple[str, ...]) -> HTTPError:
    """supported: the codings that this endpoint accepts."""
    return HTTPError(
        415,
        message,
        remedy=f"Use {', '.join(supported)}, or no Content-Encoding."
        if supported
        else "Send it without Content-Encoding.",
        code="unsupported_media_type",
        headers={"Accept-Encoding": ", ".join(supported) or "identity"},
    )


def decode(body: bytes, codings: tuple[str, ...], *, max_bytes: int) -> bytes | None:
    """The decoded body; None if it is larger than max_bytes. Raises HTTPError for a body that is damaged or incomplete."""
    for coding in reversed(codings):
        try:
            decoded = _decode_one(body, _DECODERS[coding], max_bytes=max_bytes)
        except _DAMAGED as e:
            raise HTTPError(
                400,
                f"The body is not valid {coding}, or incomplete.",
                remedy="Send all of it, with the Content-Encoding that it has.",
                code="invalid_body",
            ) from e
        if decoded is None:
            return None
        body = decoded
    return body


def _decode_one(body: bytes, make: Callable[[bytes], Decoder], *, max_bytes: int) -> bytes | None:
    """Raises EOFError for a stream without an end, or for too many streams."""
    pieces: list[bytes] = []
    num_bytes = offset = 0
    for _ in range(MAX_FRAMES):
        decoder = make(body[offset : offset + 2])
        # In chunks: a decoder copies what it does not use.
        while not decoder.eof:
            chunk = body[offset : offset + _CHUNK_BYTES]
            if not chunk:
                raise EOFError
            offset += len(chunk)
            piece = decoder.decompress(chunk, max_bytes - num_bytes + 1)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                return None
            pieces.append(piece)
        offset -= len(decoder.unused_data)
        if offset == len(body):
            return b"".join(pieces)
    raise EOFError
