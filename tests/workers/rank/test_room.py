"""A rank on a host without the memory for its weights: said before they are loaded, and tried again only where that may help."""

from dataclasses import replace

import pytest
from support.checkpoints.tiny import write_tiny_checkpoint

from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.device.fit import need_of
from workers.device.memory import Memory
from workers.errors import ConfigError, ReplicaUnavailableError
from workers.rank import room, worker
from workers.rank.reports import Rendezvous
from workers.rank.room import check_room


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    return EngineConfig(model_path=str(folder), model=load_model_config(folder), max_model_len=64)


def check(config: EngineConfig, *, total: int, available: int, num_ranks: int = 1) -> None:
    memory = Memory(total_bytes=total, available_bytes=available)
    check_room(config, num_ranks=num_ranks, memory=memory, host="cpu-7")


def test_what_could_never_fit_ends_the_start_and_what_may_fit_later_is_tried_again(config):
    need = need_of(config, has_started=True).loaded_bytes
    check(config, total=need, available=need)  # a full KV cache does not fit, which no start can know to be needed
    with pytest.raises(ConfigError, match="The model does not fit: node cpu-7"):
        check(config, total=need - 1, available=need - 1)
    with pytest.raises(ReplicaUnavailableError, match="node cpu-7"):
        check(config, total=need, available=need - 1)
    with pytest.raises(ReplicaUnavailableError, match="2 ranks: "):
        check(config, total=2 * need, available=2 * need - 1, num_ranks=2)


def test_weights_take_all_their_bytes_on_a_host_without_the_compiled_kernels(config, monkeypatch):
    narrow = replace(config, narrow_weights=True)
    whole, half = (need_of(c, has_started=True).loaded_bytes for c in (config, narrow))
    monkeypatch.setattr(room, "keeps_narrow_weights", lambda: True)
    check(narrow, total=whole - 1, available=half)
    monkeypatch.setattr(room, "keeps_narrow_weights", lambda: False)
    with pytest.raises(ConfigError, match="The model does not fit"):
        check(narrow, total=whole - 1, available=half)


def test_what_is_not_known_and_gpus_are_not_checked(config):
    check_room(config, num_ranks=1, memory=None, host="cpu-7")
    check(replace(config, device="cuda"), total=1, available=1)


def test_a_rank_asks_its_host_before_it_loads(config, monkeypatch):
    monkeypatch.setattr(worker, "read_memory", lambda: Memory(total_bytes=1000, available_bytes=1000))
    rank = worker.RankWorker(config, 0, replica_id="r0", incarnation="a", token="t")
    try:
        rank.join(Rendezvous(host="127.0.0.1", port=1, lifeline_port=1), same_host=True)
        with pytest.raises(ConfigError, match="The model does not fit"):
            rank.load()
        assert rank.progress().num_bytes_read == 0
    finally:
        rank.close()
