"""A socket to a replica's rank 0: the handshake, then every message of the replica. What they are for is the client's business."""

import asyncio
from collections.abc import Callable
from typing import Any, Self, cast

import msgspec

from workers.errors import ReplicaUnavailableError
from workers.protocol import (
    FRAME_HEADER_BYTES,
    EngineFacts,
    FromReplica,
    Hello,
    Refused,
    StepFrame,
    ToReplica,
    encode_frame,
    frame_length,
)

_decoder = msgspec.msgpack.Decoder(FromReplica)


class ReplicaConnection(asyncio.Protocol):
    """An open connection after its handshake; see `open`.

    facts, first_frame: rank 0's answers; the frame has the replica's load and everything that its prefix cache holds.
    """

    facts: EngineFacts
    first_frame: StepFrame

    def __init__(self) -> None:
        self._lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._broken: Exception | None = None
        self._unread = bytearray()  # the beginning of a frame
        self._waiting: asyncio.Queue[FromReplica] = asyncio.Queue()
        self._on_message: Callable[[FromReplica], None] = self._waiting.put_nowait

    @classmethod
    async def open(cls, replica_id: str, address: tuple[str, int], *, token: str) -> Self:
        """Raises ReplicaUnavailableError when rank 0 refuses, OSError or ValueError for anything else that fails."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, *address)
        try:
            connection.send(Hello(token=token))
            answer = await connection._next()
            if isinstance(answer, Refused):
                raise ReplicaUnavailableError(f"Replica {replica_id} refused the gateway: {answer.reason}")
            if not isinstance(answer, EngineFacts):
                raise ValueError(f"it answered Hello with {type(answer).__name__}")
            first = await connection._next()
            if not isinstance(first, StepFrame):
                raise ValueError(f"its first frame is a {type(first).__name__}")
        except BaseException:
            connection.abort()
            raise
        connection.facts, connection.first_frame = answer, first
        return connection

    def listen(self, on_message: Callable[[FromReplica], None]) -> None:
        """`on_message` gets every message after the first frame as soon as it has arrived: a task that waited for each of them would cost
        a switch per step. It must raise nothing.
        """
        self._on_message = on_message
        while self.is_open and not self._waiting.empty():
            on_message(self._waiting.get_nowait())

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: ToReplica) -> None:
        """Never waits. Dropped when the connection is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def abort(self) -> None:
        """Drops what is not sent yet, and what arrives from now on."""
        if self._transport is not None:
            self._transport.abort()

    async def lost(self) -> Exception | None:
        """Returns when the connection has ended: the error, or None if one of its ends closed it."""
        return await asyncio.shield(self._lost)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(self._broken or exc)

    def data_received(self, data: bytes | bytearray) -> None:
        if self._unread:
            self._unread += data
            data = self._unread
        begin, size = 0, len(data)
        try:
            while self.is_open and size >= (body := begin + FRAME_HEADER_BYTES):
                end = body + frame_length(bytes(data[begin:body]))
                if size < end:
                    break
                begin = end
                self._on_message(_decoder.decode(data[body:end]))
        except ValueError as e:  # msgspec's errors too
            self._broken = e
            self.abort()
        self._unread = bytearray(data[begin:]) if begin or not self._unread else self._unread

    async def _next(self) -> FromReplica:
        getting = asyncio.ensure_future(self._waiting.get())
        either: set[asyncio.Future[Any]] = {getting, self._lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            raise self._lost.result() or ConnectionError("rank 0 closed the connection")
        finally:
            getting.cancel()
