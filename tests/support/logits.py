"""Logits at every position of a prompt, as an engine's scheduler, blocks and runner compute them."""

import dataclasses

import msgspec
import numpy as np
import torch

from support.fakes.engines import make_request
from workers.engine.batch import make_batch
from workers.engine.core import EngineCore


def all_logits(core: EngineCore, prompt: list[int], *, adapter: str | None = None) -> torch.Tensor:
    """[num_tokens, vocab_size], in the chunks that the scheduler chooses. Other ranks run as followers."""
    core.add_request(msgspec.structs.replace(make_request("r", prompt, max_tokens=1), adapter=adapter))
    rows = []
    while core.has_work():
        scheduled = core.scheduler.schedule()
        if core.adapters is not None:
            assert not core.adapters.put_new(), "every rank has the adapter"
        batch = make_batch(scheduled, core.config.block_size)
        every_token = np.arange(len(batch.token_ids), dtype=np.int32)
        batch = dataclasses.replace(batch, logits_indices=every_token)
        if core.tp.size > 1:
            core.tp.broadcast(batch.pack())
        logits = core.runner.execute(batch)
        assert logits is not None, "this is rank 0"
        rows.append(logits.clone())
        for s in scheduled:
            core.kv_cache.commit(s.request.sequence, s.num_new_tokens)
            if s.request.num_computed_tokens == s.request.num_tokens:
                core.abort("r")
    return torch.cat(rows)
