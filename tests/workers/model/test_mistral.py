"""The whole model against transformers, prefilled at once, over ranks; and its parts. Chunks and decoding: tests/workers/engine."""

import pytest
import torch
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint
from support.ranks.rank_threads import run_ranks
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRMSNorm, MistralRotaryEmbedding, apply_rotary_pos_emb

from workers.attention.backend import AttentionMetadata
from workers.attention.sdpa import SdpaBackend
from workers.checkpoint.model_config import load_model_config
from workers.kernels.layers.layer_specification import rotate, silu
from workers.layers.decoder import RMSNorm
from workers.layers.rotary import RotaryEmbedding
from workers.model.mistral import MistralForCausalLM
from workers.quant.dense import CAN_PACK, linear, pack
from workers.weights.loader import load_weights

BLOCK = 16
MODELS = {
    "window": {"sliding_window": 16},
    "no window, large theta": {"sliding_window": None, "rope_theta": 1_000_000.0},
    "tied": {"tie_word_embeddings": True},
    "vocabulary to pad, wide heads": {"vocab_size": 257, "head_dim": 16, "seed": 3},
}


def prefill(folder, tp, token_ids):
    """Logits of all positions on rank 0."""
    config = load_model_config(folder)
    num_kv_heads = config.kv_heads_per_rank(tp.size)
    backend = SdpaBackend(
        num_heads=config.num_attention_heads // tp.size,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
    )
    n = len(token_ids)
    model = MistralForCausalLM(config, tp=tp, backends=[backend], dtype=torch.float32, device="cpu", max_positions=n)
    load_weights(model, folder, config)
    num_blocks = -(-n // BLOCK)
    shape = (1 + num_blocks, BLOCK, num_kv_heads, config.head_dim)
    kv_caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    metadata = AttentionMetadata(
        slot_mapping=torch.arange(BLOCK, BLOCK + n),
        block_table=torch.arange(1, 1 + num_blocks, dtype=torch.int32).unsqueeze(0),
        seq_lens=torch.tensor([n], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32),
        query_lens=[n],
        context_lens=[n],
        max_query_len=n,
        max_seq_len=n,
    )
    with torch.inference_mode():
        return model.compute_logits(model(token_ids, torch.arange(n), kv_caches, [metadata]))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_logits_equal_transformers(tmp_path, overrides, layout, size):
    compare(tmp_path, overrides, layout, size)


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 3), (9, 3, 9), (8, 2, 4), (8, 2, 8), (8, 1, 2)], ids="{}".format
)
def test_ranks_that_share_key_value_heads(tmp_path, heads, kv_heads, size, layout):
    """Also SmolLM2's 9 and 3 heads, which have a hidden size of their own in each head."""
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 144}
    compare(tmp_path, {"num_attention_heads": heads, "num_key_value_heads": kv_heads, **sizes}, layout, size)


def compare(tmp_path, overrides, layout, size):
    write_tiny_checkpoint(tmp_path, layout=layout, **overrides)
    token_ids = torch.randint(0, 256, (83,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = make_tiny_model(**overrides)(token_ids.unsqueeze(0)).logits[0]
    logits, *others = run_ranks(size, lambda tp: prefill(tmp_path, tp, token_ids))
    assert others == [None] * (size - 1)
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 2e-4


def test_rotary_equals_transformers():
    config = MistralConfig(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    rotary = RotaryEmbedding(16, 1e6, max_positions=40_000, device="cpu")
    positions = torch.tensor([0, 1, 7, 39_999])
    q = torch.randn(4, 3, 16)
    cos, sin = MistralRotaryEmbedding(config)(q, positions.unsqueeze(0))
    # theirs: [batch, num_heads, num_tokens, head_dim]
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1).unsqueeze(0), q.transpose(0, 1).unsqueeze(0), cos, sin)
    rotated = rotate(q, *rotary.angles(positions)[:2])
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1))
    assert torch.equal(rotated[0], q[0]), "position 0 turns nothing"


def test_rotary_worked_example():
    """The docstring's numbers: head_dim 4, the pairs (0, 2) and (1, 3)."""
    rotary = RotaryEmbedding(4, 10_000.0, max_positions=3, device="cpu")
    a, b = torch.tensor(2.0), torch.tensor(2.0 * 10_000.0**-0.5)
    cos, sin = (t.flatten() for t in rotary.angles(torch.tensor([2]))[:2])
    torch.testing.assert_close(cos, torch.stack([a.cos(), b.cos(), a.cos(), b.cos()]))
    torch.testing.assert_close(sin, torch.stack([-a.sin(), -b.sin(), a.sin(), b.sin()]))
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 4)
    torch.testing.assert_close(
        rotate(x, cos.view(1, 1, 4), sin.view(1, 1, 4)).flatten(), torch.stack([a.cos(), 0 * a, a.sin(), 0 * a])
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_norm_equals_transformers(dtype, tolerance):
    ours = RMSNorm(64, 1e-5, dtype=dtype, device="cpu")
    theirs = MistralRMSNorm(64, 1e-5)
    weight = torch.rand(64) + 0.5
    ours.weight.copy_(weight)
    theirs.weight.data = weight.to(dtype)
    # Values whose squares overflow or vanish in half precision.
    x = torch.randn(5, 64) * torch.tensor([1.0, 300.0, 1e-3, 40.0, 0.0]).unsqueeze(1)
    torch.testing.assert_close(ours(x.to(dtype), None)[0], theirs(x.to(dtype)), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("part", ["norm", "rotary", "silu", "linear"])
def test_a_row_has_the_same_bits_whatever_else_is_computed(part, num_threads):
    """Rows enough that three threads share them, and cut their shares in the middle of a row."""
    if part == "linear" and not CAN_PACK:
        pytest.skip("without packed weights a row's last bits depend on the number of rows")
    size = 514
    norm = RMSNorm(size, 1e-5, dtype=torch.float32, device="cpu")
    norm.weight.uniform_(0.5, 1.5)
    rotary = RotaryEmbedding(size, 1e4, max_positions=400, device="cpu")
    weight = pack(torch.nn.Parameter(torch.randn(300, size), requires_grad=False))
    compute = {
        "norm": lambda x, _: norm(x, x.flip(1))[0],
        "rotary": lambda x, positions: rotate(x[:, None], *rotary.angles(positions)[:2]),
        "silu": lambda x, _: silu(torch.cat((x, x), dim=1).chunk(2, dim=1)[0]),
        "linear": lambda x, _: linear(x, weight),
    }[part]
    x, positions = torch.randn(400, size) * 4, torch.arange(400)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        whole = compute(x, positions)
        for start, num_rows in [(0, 1), (399, 1), (7, 2), (20, 3), (33, 67), (1, 129), (100, 257), (0, 399)]:
            rows = slice(start, start + num_rows)
            assert torch.equal(compute(x[rows], positions[rows]), whole[rows]), f"{num_rows} rows"
    finally:
        torch.set_num_threads(before)
