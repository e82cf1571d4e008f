"""A GPU that was asked for and is not there ends the start with one sentence; nothing computes on the CPU in its place."""

import pytest
import torch
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config

from workers.device import require
from workers.device.probe import CudaDevice, NoGpu, probe
from workers.engine.llm_engine import LLMEngine
from workers.errors import ConfigError
from workers.rank.reports import Rendezvous
from workers.rank.worker import RankWorker

A10G = CudaDevice(name="NVIDIA A10G", memory_bytes=23_603_000_000, compute_capability=(8, 6))
needs_no_gpu = pytest.mark.skipif(not isinstance(probe(), NoGpu), reason="this machine has a GPU")


def test_the_sentence_names_who_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = NoGpu(message="The NVIDIA driver finds no GPU.", remedy="Check `nvidia-smi`.", has_gpu=True)
    monkeypatch.setattr(require, "probe", lambda: fault)
    with pytest.raises(ConfigError) as refused:
        require.require_gpu("Rank 1 on 10.0.0.2")
    assert refused.value.message == "Rank 1 on 10.0.0.2 cannot use a GPU: the NVIDIA driver finds no GPU."
    assert refused.value.remedy == "Check `nvidia-smi`."


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_on_which_torch_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(require, "probe", lambda: (A10G,))
    with pytest.raises(
        ConfigError, match=r"cannot use a GPU: torch \S+ cannot compute on NVIDIA A10G: .+\. Run `tramontane doctor`"
    ):
        require.require_gpu("This process")


@needs_no_gpu
def test_neither_an_engine_nor_a_rank_falls_back_to_the_cpu(tmp_path) -> None:
    config = make_config(write_tiny_checkpoint(tmp_path), device="cuda")
    with pytest.raises(ConfigError, match=r"^This process cannot use a GPU: "):
        LLMEngine(config)
    rank = RankWorker(config, 1, replica_id="r0", incarnation="i", token="t")
    with pytest.raises(ConfigError, match=r"^Rank 1 on \S+ cannot use a GPU: "):
        rank.join(Rendezvous(host="127.0.0.1", port=1, lifeline_port=1), same_host=True)
    rank.close()
