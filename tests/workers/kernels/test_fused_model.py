"""A whole tiny model on the kernels that a GPU runs, in the interpreter: the wiring, and the promise of the deterministic mode."""

from itertools import accumulate
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support.checkpoints.tiny import write_tiny_checkpoint

from workers.attention.backend import AttentionMetadata
from workers.attention.sdpa import SdpaBackend
from workers.attention.triton_paged import TritonBackend
from workers.checkpoint.model_config import load_model_config
from workers.kernels.layers.layer_kernels import TORCH_LAYER_KERNELS, TritonLayerKernels
from workers.kernels.layers.matmul import matmul
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import SingleRank
from workers.quant.at_load import AtLoadMethod
from workers.quant.dense import DENSE, DenseMethod
from workers.quant.pack_cuda import cuda_pack
from workers.quant.pack_dense import pack_as_dense
from workers.weights.loader import load_weights

BLOCK = 4
LENGTHS = (13, 5)
TOKEN_IDS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


class Model:
    """Computes the sequences of TOKEN_IDS in any parts; sequence i has the blocks from 1 + 4 * i on."""

    def __init__(self, folder, *, backend, kernels, method, dtype=torch.float32):
        self.config = config = load_model_config(folder)
        attention = backend(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
        )
        self.model = MistralForCausalLM(
            config,
            tp=SingleRank(),
            backends=[attention],
            dtype=dtype,
            device="cpu",
            max_positions=64,
            kernels=kernels,
            methods=lambda _: method,
        )
        load_weights(self.model, folder, config)
        self.dtype = dtype

    @torch.inference_mode()
    def logits(self, steps):
        """[num_tokens, vocab_size] of each sequence. A step is a list of (sequence, first token, end)."""
        shape = (9, BLOCK, self.config.num_key_value_heads, self.config.head_dim)
        kv_caches = [tuple(torch.zeros(shape, dtype=self.dtype) for _ in "kv") for _ in self.model.model.layers]
        logits = [[], []]
        for step in steps:
            positions = torch.cat([torch.arange(start, end) for _, start, end in step])
            query_lens = [end - start for _, start, end in step]
            context_lens = [end for *_, end in step]
            first_slots = [torch.full((end - start,), (1 + 4 * i) * BLOCK) for i, start, end in step]
            metadata = AttentionMetadata(
                slot_mapping=torch.cat(first_slots) + positions,
                block_table=torch.stack([torch.arange(1 + 4 * i, 5 + 4 * i, dtype=torch.int32) for i, *_ in step]),
                seq_lens=torch.tensor(context_lens, dtype=torch.int32),
                cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32),
                query_lens=query_lens,
                context_lens=context_lens,
                max_query_len=max(query_lens),
                max_seq_len=max(context_lens),
            )
            token_ids = torch.cat([TOKEN_IDS[i][start:end] for i, start, end in step])
            hidden_states = self.model(token_ids, positions, kv_caches, [metadata])
            parts = self.model.compute_logits(hidden_states).split(query_lens)
            for (i, *_), part in zip(step, parts, strict=True):
                logits[i].append(part)
        return [torch.cat(parts) if parts else None for parts in logits]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), sliding_window=6)


def counting_kernels():
    kernels = TritonLayerKernels()
    return SimpleNamespace(
        add_rms_norm=Mock(wraps=kernels.add_rms_norm),
        rotary_kv=Mock(wraps=kernels.rotary_kv),
        silu_mul=Mock(wraps=kernels.silu_mul),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_model_computes_what_the_plain_one_computes(folder, dtype):
    kernels = counting_kernels()
    plain = Model(folder, backend=SdpaBackend, kernels=TORCH_LAYER_KERNELS, method=DENSE, dtype=dtype)
    fused = Model(folder, backend=SdpaBackend, kernels=kernels, method=DENSE, dtype=dtype)
    steps = [[(0, 0, 9), (1, 0, 5)], [(0, 9, 12)], [(0, 12, 13)]]
    for actual, expected in zip(fused.logits(steps), plain.logits(steps), strict=True):
        assert expected.abs().max() > 1
        off = (actual - expected).abs().max().item()
        assert off <= (1e-4 if dtype == torch.float32 else 0.06), f"{off} off"
    # Two layers: two norms in each and one at the end, all others once in each.
    launches = [kernels.add_rms_norm.call_count, kernels.rotary_kv.call_count, kernels.silu_mul.call_count]
    assert launches == [5 * len(steps), 2 * len(steps), 2 * len(steps)]


def test_in_deterministic_mode_a_token_has_the_same_bits_however_it_is_computed(folder):
    product = Mock(wraps=matmul)
    settings = {"backend": TritonBackend, "kernels": TritonLayerKernels(), "dtype": torch.float16}
    model = Model(folder, method=DenseMethod(product), **settings)
    alone = model.logits([[(0, 0, 13)], [(1, 0, 5)]])
    chunked = model.logits([[(0, 0, 5)], [(0, 5, 12), (1, 0, 4)], [(0, 12, 13), (1, 4, 5)]])
    for actual, expected in zip(chunked, alone, strict=True):
        assert torch.equal(actual, expected), f"{(actual - expected).abs().max()} off"
    assert product.call_count == 5 * (2 * 4 + 1), "every product of both layers and the head, in five steps"


@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8"])
def test_with_quantised_weights_too(folder, quantization):
    """Exact next to the plain model with the same weights as plain numbers, and with the same bits however a token is computed."""
    cpu = torch.device("cpu")
    pack = cuda_pack(DENSE, capability=(9, 0), deterministic=True)
    method = AtLoadMethod(quantization, pack, device=cpu, tied=DENSE)
    settings = {"backend": SdpaBackend, "kernels": TORCH_LAYER_KERNELS}
    model = Model(folder, method=method, **settings)
    dense = AtLoadMethod(quantization, pack_as_dense(DENSE), device=cpu, tied=DENSE)
    plain = Model(folder, method=dense, **settings)
    alone = model.logits([[(0, 0, 13)], [(1, 0, 5)]])
    chunked = model.logits([[(0, 0, 9)], [(0, 9, 12), (1, 0, 4)], [(0, 12, 13), (1, 4, 5)]])
    for actual, expected, exact in zip(chunked, alone, plain.logits([[(0, 0, 13), (1, 0, 5)]]), strict=True):
        assert torch.equal(actual, expected), f"{(actual - expected).abs().max()} off"
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)
