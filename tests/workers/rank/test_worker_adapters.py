"""A replica's ranks load and unload adapters while they serve, and before they are ready. Group tier: two processes."""

import asyncio

import msgspec
import pytest
from support.checkpoints.adapters import write_adapter
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.ranks.worker_ranks import TOKEN, RankProcesses

from cluster.replicas.client import ReplicaClient
from workers.checkpoint.model_config import load_model_config
from workers.errors import CheckpointError, ConfigError
from workers.lora.peft_folder import read_adapter
from workers.protocol import FinishReason

pytestmark = pytest.mark.group
LORA = {"enable_lora": True, "max_loras": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """{revision: folder}"""
    root, model = tmp_path_factory.mktemp("adapters"), load_model_config(folder)
    folders = [write_adapter(root / name, model, seed=i) for i, name in enumerate("abc")]
    return {f"{f.name}@{read_adapter(f, model, max_rank=64).digest}": str(f) for f in folders}


def request_of(name, revision, max_tokens=20):
    return msgspec.structs.replace(make_request(name, [5, 6, 7, 8, 9], max_tokens=max_tokens), adapter=revision)


async def test_two_ranks_load_and_unload_while_they_serve(folder, adapters):
    alone = make_engine(folder, **LORA)
    expected = {}
    for revision, path in adapters.items():
        alone.load_adapter(revision[0], path)
        (expected[revision],) = alone.generate([request_of("r", revision)])
    (first, path), *later = adapters.items()
    with RankProcesses(make_config(folder, tensor_parallel_size=2, **LORA), until="load") as ranks:
        ranks.on_all("load_adapter", first, path)
        started = ranks.on_all("start")[0]
        assert ranks.on_all("adapters") == [(first,)] * 2
        async with ReplicaClient("r0", (started.host, started.port), TOKEN) as client:

            async def generate(name, revision, max_tokens=20):
                found = [d async for d in client.generate(request_of(name, revision, max_tokens))]
                return [t for d in found for t in d.token_ids], found[-1]

            long = asyncio.create_task(generate("long", first, 100))
            for revision, path in later:
                await asyncio.to_thread(ranks.on_all, "load_adapter", revision, path)
                await asyncio.to_thread(ranks.on_all, "load_adapter", revision, path)
            found = await asyncio.gather(*(generate(r, r) for r in adapters))
            assert [tokens for tokens, _ in found] == list(expected.values()), "more adapters than slots"
            assert (await long)[0][:20] == expected[first]

            await asyncio.to_thread(ranks.on_all, "unload_adapter", first)
            assert first not in ranks.call(0, "adapters") and first not in ranks.call(1, "adapters")
            tokens, end = await generate("gone", first)
            assert (tokens, end.finish_reason, end.refused) == ([], FinishReason.ERROR, False)
            assert f"The adapter '{first}' is not loaded on this replica." in end.error
            await asyncio.to_thread(ranks.on_all, "load_adapter", first, adapters[first])
            assert (await generate("back", first))[0] == expected[first]


def test_what_cannot_be_loaded_is_said(folder, adapters):
    (first, path), (second, _), *_ = adapters.items()
    with RankProcesses(make_config(folder, **LORA), until="load") as ranks:
        with pytest.raises(CheckpointError, match=f"other content than the revision {second}"):
            ranks.call(0, "load_adapter", second, path)
        with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
            ranks.call(0, "load_adapter", "x", str(folder))
        assert ranks.call(0, "adapters") == ()
        ranks.call(0, "load_adapter", first, path)
        ranks.call(0, "unload_adapter", first)
        assert ranks.call(0, "adapters") == ()
    with RankProcesses(make_config(folder), until="load") as ranks, pytest.raises(ConfigError, match="--enable-lora"):
        ranks.call(0, "load_adapter", first, path)
