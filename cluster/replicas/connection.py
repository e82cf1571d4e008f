"""Opens a socket to a replica's rank 0 and reads its frames. Knows the handshake; what the frames are for is the client's business."""

import asyncio
from typing import NamedTuple

import msgspec

from workers.errors import ReplicaUnavailableError
from workers.protocol import (
    FRAME_HEADER_BYTES,
    EngineFacts,
    FromReplica,
    Hello,
    Refused,
    StepFrame,
    encode_frame,
    frame_length,
)

_decoder = msgspec.msgpack.Decoder(FromReplica)


class Opened(NamedTuple):
    """A connection after its handshake. first_frame: the replica's load and everything that its prefix cache holds."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    facts: EngineFacts
    first_frame: StepFrame


async def open_connection(replica_id: str, address: tuple[str, int], *, token: str) -> Opened:
    """Raises ReplicaUnavailableError when rank 0 refuses, OSError, IncompleteReadError or ValueError for anything else that fails."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(encode_frame(Hello(token=token)))
        answer = await read_message(reader)
        if isinstance(answer, Refused):
            raise ReplicaUnavailableError(f"Replica {replica_id} refused the gateway: {answer.reason}")
        if not isinstance(answer, EngineFacts):
            raise ValueError(f"it answered Hello with {type(answer).__name__}")
        first = await read_message(reader)
        if not isinstance(first, StepFrame):
            raise ValueError(f"its first frame is a {type(first).__name__}")
    except BaseException:
        writer.transport.abort()
        raise
    return Opened(reader, writer, answer, first)


async def read_message(reader: asyncio.StreamReader) -> FromReplica:
    """Raises ValueError for a frame that is too large or broken, IncompleteReadError at the end of the connection."""
    length = frame_length(await reader.readexactly(FRAME_HEADER_BYTES))
    return _decoder.decode(await reader.readexactly(length))
