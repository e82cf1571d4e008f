"""A mix of attacks on a running server, bounded in rate, in time and in the connections it holds. Knows requests; measures nothing.

Ten kinds: ambiguous grammars, random schemas, bodies of megabytes, slow readers, connection floods, invalid requests, embeddings, long
prompts, aborted streams, and names that a client makes up (paths, keys, models, request ids). Seeded: the same seed sends the same.
"""

import asyncio
import contextlib
import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from support.clients.fuzz_bodies import mutated_bodies, other_bodies
from support.clients.random_schemas import random_schema
from support.clients.raw_http import request

VOCABULARY = range(300, 4000)  # ids of the demo model that are plain text
MAX_ANSWER_BYTES = 64 * 1024  # of an answer, the rest is not read
PATIENCE_S = 30.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Attacks a second of each kind, at rate 1. Prompts are few, so that the engine has time for grammars too.
RATES = {
    "grammars": 1.0,
    "schemas": 4.0,
    "huge bodies": 1.0,
    "slow readers": 0.5,
    "floods": 0.2,
    "invalid requests": 30.0,
    "embeddings": 1.0,
    "long prompts": 0.1,
    "aborted streams": 2.0,
    "made-up names": 10.0,
}


class AttackMix:
    """Sends to 127.0.0.1:port with this key. `statuses`: the answers by kind of attack and HTTP status; "none" is a closed connection.

    max_prompt_tokens: the longest prompt that the server takes.
    """

    def __init__(
        self, port: int, key: str, *, model: str = "demo_model", max_prompt_tokens: int = 4000, seed: int = 0
    ) -> None:
        self.statuses: dict[str, Counter[str]] = {kind: Counter() for kind in RATES}
        self._port = port
        self._key = key
        self._model = model
        self._max_prompt_tokens = max_prompt_tokens
        self._max_tokens = max_prompt_tokens // 2  # of a stream that nobody reads to its end
        self._rng = random.Random(seed)
        self._numbers = itertools.count(seed * 1_000_000)
        self._bodies = self._invalid_bodies()
        self._attacks: dict[str, Callable[[], Awaitable[str]]] = {
            "grammars": self._grammar,
            "schemas": self._schema,
            "huge bodies": self._huge_body,
            "slow readers": self._slow_reader,
            "floods": self._flood,
            "invalid requests": self._invalid,
            "embeddings": self._embeddings,
            "long prompts": self._long_prompt,
            "aborted streams": self._aborted_stream,
            "made-up names": self._made_up_names,
        }

    @property
    def num_sent(self) -> int:
        return sum(counter.total() for counter in self.statuses.values())

    async def run(self, seconds: float, *, rate: float = 1.0) -> None:
        """Attacks for so long, with `rate` times RATES, or less if the server answers more slowly. Ends with nothing open."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._repeat(kind, per_second * rate, until) for kind, per_second in RATES.items()))

    async def _repeat(self, kind: str, per_second: float, until: float) -> None:
        """At most a few at once, so that a slow server is not buried under what it has not answered yet."""
        at_once = asyncio.Semaphore(8)
        async with asyncio.TaskGroup() as running:
            while time.monotonic() < until:
                await at_once.acquire()
                running.create_task(self._attack(kind, at_once))
                await asyncio.sleep(self._rng.expovariate(per_second))

    async def _attack(self, kind: str, at_once: asyncio.Semaphore) -> None:
        status = "none"
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(PATIENCE_S):
                    status = await self._attacks[kind]()
        finally:
            at_once.release()
            self.statuses[kind][status] += 1

    # The kinds of attacks. Each returns the status of its answer.

    async def _grammar(self) -> str:
        """Ambiguous, so that every token costs time, and never the same twice."""
        words = " | ".join(f'"{self._word()}"' for _ in range(self._rng.randint(1, 40)))
        grammar = f'start: s\ns: s s | s s s | A | B\nA: "a" | {words}\nB: "a" | "aa" | /[a-z]{{1,{self._number() % 50 + 1}}}/'
        return await self._complete(structured_outputs={"grammar": grammar}, max_tokens=16)

    async def _schema(self) -> str:
        schema = {"name": "x", "schema": random_schema(self._number())}
        body = self._chat(
            response_format={"type": "json_schema", "json_schema": schema}, max_tokens=48, temperature=1.0
        )
        return await self._ask(request(CHAT, body, key=self._key))

    async def _huge_body(self) -> str:
        size = self._rng.randint(1, 7) * 2**20
        values = ("x" * size, [self._word()] * (size // 12), list(range(300, 300 + size // 8)))
        return await self._complete(prompt=self._rng.choice(values))

    async def _slow_reader(self) -> str:
        """Reads a long stream a few bytes at a time, then leaves."""
        body = self._body(max_tokens=self._max_tokens, stream=True, logprobs=5, ignore_eos=True)
        async with self._connected(receive_buffer=4096) as (reader, writer):
            writer.write(request(COMPLETIONS, body, key=self._key))
            status = (await reader.readexactly(12))[9:].decode()
            with contextlib.suppress(OSError):  # the server ends it
                for _ in range(20):
                    await asyncio.sleep(0.25)
                    await reader.read(200)
        return status

    async def _flood(self) -> str:
        """Connections with nothing, or with a part of a head, all at once."""
        opened: list[asyncio.StreamWriter] = []
        try:
            for i in range(100):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                opened.append(writer)
                if i % 2:
                    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Part: " + b"y" * (i * 10))
            await asyncio.sleep(2.0)
        finally:
            for writer in opened:
                writer.transport.abort()
        return "closed"

    async def _invalid(self) -> str:
        path, body = next(self._bodies)
        return await self._ask(request(path, body, key=self._key))

    async def _embeddings(self) -> str:
        texts = [
            " ".join(self._word() for _ in range(self._rng.randint(1, 30))) for _ in range(self._rng.randint(1, 8))
        ]
        body = json.dumps({"model": self._model, "input": texts}).encode()
        return await self._ask(request("/v1/embeddings", body, key=self._key))

    async def _long_prompt(self) -> str:
        length = self._rng.randint(self._max_prompt_tokens // 2, self._max_prompt_tokens)
        return await self._complete(prompt=self._rng.choices(VOCABULARY, k=length), max_tokens=4)

    async def _aborted_stream(self) -> str:
        body = self._body(max_tokens=self._max_tokens, stream=True, n=self._rng.randint(1, 8), ignore_eos=True)
        async with self._connected() as (reader, writer):
            writer.write(request(COMPLETIONS, body, key=self._key))
            status = (await reader.readexactly(12))[9:].decode()
            await reader.read(self._rng.randint(1, 4096))
            writer.transport.abort()
        return status

    async def _made_up_names(self) -> str:
        name = self._word()
        number = self._rng.randrange(5)
        if number == 0:
            return await self._ask(
                request(f"/v1/{name}/{name}", method=self._rng.choice(["GET", "POST"]), key=self._key)
            )
        if number == 1:
            return await self._ask(request(COMPLETIONS, self._body(), key=name))
        if number == 2:
            return await self._ask(request(COMPLETIONS, self._body(model=name), key=self._key))
        if number == 3:
            return await self._ask(request(f"/v1/batches/{name}", method="GET", key=self._key, content_type=None))
        headers = [("X-Request-Id", name), (f"X-{name}", name), ("traceparent", name)]
        return await self._ask(request(COMPLETIONS, self._body(user=name), key=self._key, headers=headers))

    # What they share.

    def _number(self) -> int:
        return next(self._numbers)

    def _word(self) -> str:
        return "".join(self._rng.choices("abcdefghijklmnopqrstuvwxyz", k=self._rng.randint(3, 12)))

    def _body(self, **fields: object) -> bytes:
        prompt = self._rng.choices(VOCABULARY, k=self._rng.randint(4, 64))
        return json.dumps({"model": self._model, "prompt": prompt, "max_tokens": 4, **fields}).encode()

    def _chat(self, **fields: object) -> bytes:
        messages = [{"role": "user", "content": self._word()}]
        return json.dumps({"model": self._model, "messages": messages, **fields}).encode()

    async def _complete(self, **fields: object) -> str:
        return await self._ask(request(COMPLETIONS, self._body(**fields), key=self._key))

    def _invalid_bodies(self) -> Iterator[tuple[str, bytes]]:
        """Without end. A sample of all mutations at a time, since all together are 600 MB."""
        while True:
            yield from (pair for pair in mutated_bodies() if self._rng.random() < 0.02)
            yield from other_bodies(self._rng, 300)

    async def _ask(self, data: bytes) -> str:
        """The status of the answer, of which as much is read as arrives at once, up to MAX_ANSWER_BYTES."""
        async with self._connected() as (reader, writer):
            writer.write(data)
            status = (await reader.readexactly(12))[9:].decode()
            await reader.read(MAX_ANSWER_BYTES)
        return status

    @contextlib.asynccontextmanager
    async def _connected(
        self, *, receive_buffer: int | None = None
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        writer = None
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_ANSWER_BYTES)
            yield reader, writer
        finally:
            if writer is not None:
                writer.transport.abort()
            sock.close()
