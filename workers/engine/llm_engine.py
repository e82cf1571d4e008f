"""The engine in one process, without Ray and without HTTP: for tests, benchmarks and `tramontane generate`. Needs only torch."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from workers.config import EngineConfig, requested_num_threads
from workers.device.require import require_gpu
from workers.device.sizes import sized_for
from workers.engine.build import Progress, build_runner
from workers.engine.core import EngineCore
from workers.engine.loop import Core
from workers.errors import ConfigError, RequestError
from workers.lora.peft_folder import read_adapter
from workers.parallel.group import SingleRank
from workers.protocol import FinishReason, GenerateRequest, TokenDelta


class LLMEngine:
    """Loads the model and runs requests. Raises ConfigError and CheckpointError for a model that cannot be loaded."""

    def __init__(self, config: EngineConfig, *, progress: Progress | None = None) -> None:
        if config.tensor_parallel_size != 1:
            raise ConfigError(
                "One process runs one rank only.",
                remedy="Use `tramontane serve` for --tensor-parallel-size above 1.",
                param="--tensor-parallel-size",
            )
        gpu = require_gpu("This process") if config.device == "cuda" else None
        if config.num_threads is None:
            config = replace(config, num_threads=requested_num_threads(os.environ))
        tp = SingleRank(config.device)
        config = sized_for(config, gpu, tp.min)
        runner = build_runner(config, tp, progress)
        runner.allocate_kv_cache()
        self.core = EngineCore(config, runner, tp)

    def load_adapter(self, name: str, folder: str | Path) -> str:
        """Loads a PEFT adapter, and returns the revision that requests name. Raises CheckpointError for one that does not fit the model."""
        config, adapters = self.core.config, self.core.runner.adapters
        if adapters is None:
            raise ConfigError(
                "The engine serves no adapters.", remedy="Make it with enable_lora.", param="--enable-lora"
            )
        info = read_adapter(folder, config.model, max_rank=config.max_lora_rank)
        revision = f"{name}@{info.digest}"
        adapters.load(revision, folder)
        return revision

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[int]]:
        """See `run_requests`."""
        return run_requests(self.core, requests)

    def stream(self, *requests: GenerateRequest) -> Iterator[TokenDelta]:
        """See `stream_requests`."""
        return stream_requests(self.core, requests)


def run_requests(core: EngineCore, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """Output token ids in the order of `requests`, which run together. Raises RequestError for one that cannot be served."""
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    if len(outputs) != len(requests):
        raise RequestError("Two requests share one request_id.", remedy="Make them differ.", param="request_id")
    for delta in stream_requests(core, requests):
        outputs[delta.request_id] += delta.token_ids
    return list(outputs.values())


def stream_requests(core: Core, requests: Sequence[GenerateRequest]) -> Iterator[TokenDelta]:
    """Deltas of all the requests as steps produce them. Closing the iterator early aborts unfinished requests."""
    added = []
    try:
        for request in requests:
            core.add_request(request)
            added.append(request.request_id)
        while core.has_work():
            for delta in core.step():
                if delta.finish_reason is FinishReason.ERROR:
                    raise RequestError(delta.error or "The request failed.")
                yield delta
    finally:
        for request_id in added:
            core.abort(request_id)
