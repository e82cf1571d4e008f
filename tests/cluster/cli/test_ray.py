"""The spec that `serve` gives the controller."""

import os

import pytest

from cluster.cli.ray import spec_of
from cluster.config.serve import ServeConfig
from workers.config import EngineConfig, ModelConfig

MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    sliding_window=None,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_ids=(2,),
    tie_word_embeddings=False,
    dtype="float32",
    layout="huggingface",
)


@pytest.mark.parametrize(
    ("variable", "max_replicas", "own_cluster", "num_threads"),
    [
        (None, 1, True, 8),
        (None, 3, True, 2),
        (None, 16, True, 1),
        ("3", 2, True, 3),
        # A joined cluster has other machines: each rank counts its own cores.
        ("3", 2, False, None),
    ],
)
def test_the_ranks_of_one_machine_share_its_cores(monkeypatch, variable, max_replicas, own_cluster, num_threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    engine = EngineConfig(model_path="model", model=MODEL)
    config = ServeConfig(
        engine=engine, model_name="m", max_queued_tokens=1, queue_timeout_s=1.0, max_replicas=max_replicas
    )
    assert spec_of(config, own_cluster=own_cluster).engine.num_threads == num_threads
