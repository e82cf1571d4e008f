"""Batches without a cluster: a simulated executor, input files, and readers for the finished files of a batch."""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord, FileRecord, Line, LineResult, new_batch_id, new_file_id
from cluster.batch.run.runner import RunnerOptions
from cluster.batch.run.window import WindowOptions
from cluster.batch.store.interface import Store
from cluster.batch.store.open import open_files, open_store
from workers.errors import ReplicaUnavailableError, RequestError

FAST = RunnerOptions(
    lease_ttl_s=2.0, check_every_s=0.02, window=WindowOptions(commit_every_s=0.005, min_pause_s=0.01, max_pause_s=0.05)
)
ENDPOINT = "/v1/completions"


class SimulatedExecutor:
    """Answers each line after `latency_s` (plus or minus half) with a function of its body and seed.

    fault: called with each line before it is answered; may raise. poison: custom_ids that kill the only replica, together with every
    other line in flight on it.
    """

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        capacity: int = 32,
        poison: Iterable[str] = (),
        fault: Callable[[Line], None] | None = None,
    ) -> None:
        self.latency_s = latency_s
        self.capacity = capacity
        self.poison = frozenset(poison)
        self.fault = fault
        self.executed: list[str] = []
        self.answered: list[str] = []
        self.in_flight_counts: list[int] = []  # how many lines were in flight as each started
        self.num_deaths = 0
        self.disturbed_suspects: list[str] = []  # lines with crashes that ran together with others
        self._in_flight: dict[asyncio.Future[None], Line] = {}

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        found = json.loads(body)
        if "prompt" not in found:
            raise RequestError(
                "Missing required parameter: 'prompt'.", param="prompt", code="missing_required_parameter"
            )
        return found["model"]

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        self.executed.append(line.custom_id)
        self.in_flight_counts.append(len(self._in_flight) + 1)
        if self.fault is not None:
            self.fault(line)
        if self.latency_s or self.poison:
            await self._wait(line)
        self.answered.append(line.custom_id)
        return answer(line, body, seed)

    async def _wait(self, line: Line) -> None:
        death = asyncio.get_running_loop().create_future()
        self._in_flight[death] = line
        if len(self._in_flight) > 1:
            self.disturbed_suspects += [x.custom_id for x in self._in_flight.values() if x.crashes]
        try:
            factor = 0.25 if line.custom_id in self.poison else random.uniform(0.5, 1.5)  # it dies while others run
            async with asyncio.timeout(self.latency_s * factor):
                await death
        except TimeoutError:
            if line.custom_id not in self.poison:
                return
            self.num_deaths += 1
            alone = len(self._in_flight) == 1
            for other in self._in_flight:
                if not other.done():
                    other.set_exception(ReplicaUnavailableError("replica r0 ended: out of memory", crashed=True))
            raise ReplicaUnavailableError("replica r0 ended: out of memory", crashed=True, alone=alone) from None
        finally:
            del self._in_flight[death]


def answer(line: Line, body: bytes, seed: int) -> LineResult:
    """Status 400 for a prompt that starts with "refuse", otherwise a text that depends on every bit of the request."""
    found = json.loads(body)
    if str(found["prompt"]).startswith("refuse"):
        error = {"error": {"message": "No.", "type": "invalid_request_error", "param": "prompt", "code": None}}
        return LineResult(number=line.number, status_code=400, request_id="req-1", body=json.dumps(error).encode())
    text = hashlib.blake2b(f"{found['prompt']}:{found.get('seed', seed)}".encode(), digest_size=8).hexdigest()
    data = {"object": "text_completion", "choices": [{"index": 0, "text": text}], "usage": {"completion_tokens": 5}}
    return LineResult(
        number=line.number,
        status_code=200,
        request_id=f"req-{line.number}",
        body=json.dumps(data).encode(),
        num_prompt_tokens=7,
        num_cached_tokens=3,
        num_output_tokens=5,
    )


def request(custom_id: str, prompt: str = "hello", **fields: object) -> bytes:
    body = {"model": "demo", "prompt": prompt, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"


def requests(num: int, *, seeded: bool = False) -> list[bytes]:
    """In groups of ten with a long common prefix."""
    return [
        request(f"r{i}", f"{'opening ' * 40}{i // 10} {i}", max_tokens=5 + i % 7, **({"seed": i} if seeded else {}))
        for i in range(num)
    ]


def opened(folder: Path) -> tuple[Store, FileContents]:
    return open_store(folder), open_files(folder)


async def add_batch(
    store: Store, files: FileContents, lines: Sequence[bytes], *, lasts_s: float = 3600, batch_id: str | None = None
) -> BatchRecord:
    """Adds a batch that waits for a runner."""

    async def chunks():
        yield b"".join(lines)

    now, file_id = int(time.time()), new_file_id()
    num_bytes = await files.write(file_id, chunks())
    await store.add_file(
        FileRecord(id=file_id, filename="in.jsonl", purpose="batch", num_bytes=num_bytes, created_at=now)
    )
    batch = BatchRecord(
        id=batch_id or new_batch_id(),
        endpoint=ENDPOINT,
        input_file_id=file_id,
        completion_window="1h",
        created_at=now,
        expires_at=int(now + lasts_s),
    )
    await store.add_batch(batch)
    return batch


def read_lines(files: FileContents, file_id: str | None) -> list[dict]:
    if file_id is None:
        return []
    return [json.loads(line) for line in files.path(file_id).read_bytes().splitlines()]


def texts(lines: Iterable[dict]) -> dict[str, str]:
    """custom_id -> text of the answer. Fails if a custom_id occurs twice."""
    found = [(line["custom_id"], line["response"]["body"]["choices"][0]["text"]) for line in lines]
    assert len(dict(found)) == len(found), "a custom_id occurs twice in one file"
    return dict(found)
