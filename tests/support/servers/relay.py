"""A wire between a gateway and rank 0 that breaks after an exact number of tokens: the replica dies there, as the gateway sees it."""

import asyncio
import contextlib

import msgspec

from workers.protocol import FRAME_HEADER_BYTES, FromReplica, StepFrame, encode_frame, frame_length

_decoder = msgspec.msgpack.Decoder(FromReplica)


class CuttingRelay:
    """Passes everything on until `cut_after` tokens have come from the replica, then drops the connection and refuses others.

    `num_tokens`: those that came through. Use as an async context manager.
    """

    def __init__(self, upstream: tuple[str, int], *, cut_after: int | None) -> None:
        self.num_tokens = 0
        self.is_cut = False
        self._upstream = upstream
        self._cut_after = cut_after
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> tuple[str, int]:
        assert self._server is not None
        return self._server.sockets[0].getsockname()[:2]

    async def __aenter__(self) -> "CuttingRelay":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.is_cut:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        passing_up = asyncio.create_task(self._pass_up(reader, up_writer))
        try:
            await self._pass_down(up_reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            passing_up.cancel()
            await asyncio.gather(passing_up, return_exceptions=True)
            writer.transport.abort()
            up_writer.transport.abort()

    async def _pass_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)

    async def _pass_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not self.is_cut:
            header = await reader.readexactly(FRAME_HEADER_BYTES)
            message = _decoder.decode(await reader.readexactly(frame_length(header)))
            if isinstance(message, StepFrame):
                message = self._shorten(message)
            writer.write(encode_frame(message))
        await writer.drain()
        writer.close()  # what was passed on still arrives

    def _shorten(self, frame: StepFrame) -> StepFrame:
        deltas = []
        for delta in frame.deltas:
            if self.num_tokens == self._cut_after:
                break
            self.num_tokens += len(delta.token_ids)
            deltas.append(delta)
        self.is_cut = bool(frame.deltas) and self.num_tokens == self._cut_after
        return msgspec.structs.replace(frame, deltas=deltas)
