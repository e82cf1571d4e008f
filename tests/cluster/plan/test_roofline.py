"""The roofline against hand arithmetic."""

from dataclasses import replace

import pytest

from cluster.plan.gpus import GPUS
from cluster.plan.models import V0_1, V0_3
from cluster.plan.roofline import Speed, Workload, speed
from workers.config import EngineConfig, ModelConfig


def speed_of(model: ModelConfig, gpu: str, ranks: int, workload: Workload) -> Speed:
    config = EngineConfig(
        model_path="",
        model=model,
        device="cuda",
        dtype="bfloat16",
        tensor_parallel_size=ranks,
        max_model_len=workload.context,
        max_num_seqs=workload.concurrency,
    )
    return speed(config, GPUS[gpu], workload)


# By hand, for one token of each of 32 requests that have 6,144 tokens before it on average (8,192 of context, 4,096 of prompt).
#
# Read: v0.3's weights without the embedding, 14,496,047,104 - 268,435,456 = 14,227,611,648 bytes, and keys and values,
# 32 x 6,144 x 131,072 = 25,769,803,776; of v0.1 14,221,320,192 and, with the window's 4,096 keys, 17,179,869,184. Two and four ranks
# read half and a quarter each, and the norms' 532,480 bytes whole. Arithmetic, 2 x 32 x 7.1e9 and attention's, is far below that.
# An all-reduce of 32 x 4,096 x 2 = 262,144 bytes: PCIe 30 us + 1.5 x 262,144 / 10e9 = 69.3 us with four ranks, NVLink 15 us +
# 262,144 / 230e9 = 16.1 us with two; 65 of them.
HAND_MS = [
    (V0_3, "A10G", 1, (14_227_611_648 + 25_769_803_776) / 600e6),
    (V0_1, "A10G", 1, (14_221_320_192 + 17_179_869_184) / 600e6),
    (V0_3, "A10G", 4, 16.667 + 65 * 0.0693216),
    (V0_1, "A10G", 4, 13.084 + 65 * 0.0693216),
    (V0_3, "A100", 1, (14_227_611_648 + 25_769_803_776) / 1555e6),
    (V0_3, "A100", 2, 12.861 + 65 * 0.01614),
    (V0_1, "A100", 2, 10.097 + 65 * 0.01614),
    (V0_3, "A100-80GB", 1, (14_227_611_648 + 25_769_803_776) / 1935e6),
    (V0_3, "H200", 1, (14_227_611_648 + 25_769_803_776) / 4800e6),
]


@pytest.mark.parametrize(("model", "gpu", "ranks", "expected_ms"), HAND_MS)
def test_a_step_by_hand(model, gpu, ranks, expected_ms):
    found = speed_of(model, gpu, ranks, Workload(context=8192, concurrency=32, prompt_tokens=4096))
    assert found.step_s * 1e3 == pytest.approx(expected_ms, rel=1e-3)


def test_a_prompt_by_hand():
    """Arithmetic decides: of 1,024 tokens each takes two operations for each of 6,979,588,096 weights of the layers, and for attention
    4 x 4,096 x keys x 32 layers; one row of logits 2 x 134,217,728. The first chunk sees 512 keys on average, the second 1,536.
    """
    found = speed_of(V0_3, "A10G", 1, Workload(context=4096, concurrency=1, prompt_tokens=2048))
    weights = 2 * 1024 * 6_979_588_096 + 2 * 134_217_728
    attention = 1024 * 4 * 4096 * 32 * (512 + 1536)
    assert found.prefill_s == pytest.approx((2 * weights + attention) / 70e12, rel=1e-6)


def test_a_short_prompt_reads_the_weights_once():
    found = speed_of(V0_3, "A10G", 1, Workload(context=64, concurrency=1, prompt_tokens=16))
    assert found.prefill_s == pytest.approx(14_227_611_648 / 600e9, rel=1e-3)


def test_throughput_counts_the_prompts():
    """An answer of 100 tokens costs its prompt's time and 100 shares of a step."""
    workload = Workload(context=4096, concurrency=8, prompt_tokens=3996)
    found = speed_of(V0_3, "A100", 1, workload)
    assert found.tokens_per_s == pytest.approx(100 / (found.prefill_s + 100 * found.step_s / 8))
    assert found.tokens_per_s < 8 / found.step_s


def test_a_tied_head_is_read_although_it_is_the_embedding():
    workload = Workload(context=64, concurrency=1, prompt_tokens=32)
    untied, tied = (speed_of(m, "A10G", 1, workload) for m in (V0_3, replace(V0_3, tie_word_embeddings=True)))
    assert tied.step_s == pytest.approx(untied.step_s)
