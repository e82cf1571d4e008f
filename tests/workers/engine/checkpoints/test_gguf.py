"""The engine on GGUF files of every type, against transformers on the weights that the `gguf` package reads from the same file."""

import pytest
import torch
from support.checkpoints.gguf_files import LARGE, QUANTIZABLE, RANDOM_BLOCKS, dequantized_model, write_gguf
from support.checkpoints.tiny import TINY, make_tiny_model
from support.fakes.engines import make_config, make_engine, make_request
from support.ranks.rank_threads import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from workers.checkpoint.gguf.gguf_types import GROUPED_TYPES
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import stream_requests

# Of log-probabilities from -12 to -1. Rounded inputs may fall to either side where float32 sums differ in their last bits: where, and so
# in how many positions and how far, depends on the processor.
TOLERANCE, ROUNDED_TOLERANCE, LOST_BY_ROUNDING = 2e-4, 0.1, 0.05
PROMPT = torch.randint(3, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def logprobs(path):
    return prompt_logprobs(make_engine(path).core)


def prompt_logprobs(core):
    """[len(PROMPT) - 1] of each token after the first, by the engine."""
    request = make_request("r", PROMPT, max_tokens=1, prompt_logprobs=0)
    first = next(iter(stream_requests(core, [request])))
    return torch.tensor([one.logprob for one in first.prompt_logprobs[1:]])


def expected_logprobs(model):
    with torch.inference_mode():
        rows = model(torch.tensor([PROMPT])).logits[0].log_softmax(dim=-1)
    return rows[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def round_inputs(model, group_size):
    """From now on products round their inputs to 8 bits in groups, as those of quantised weights do."""

    def rounded(_, inputs):
        groups = inputs[0].unflatten(-1, (-1, group_size))
        largest = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        return ((groups * (torch.full_like(largest, 127) / largest)).round() * (largest / 127)).flatten(-2)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    return model


@pytest.mark.parametrize("dtype", [*QUANTIZABLE, *RANDOM_BLOCKS])
def test_every_type_computes_its_own_dequantization(tmp_path, dtype):
    model = make_tiny_model(sliding_window=None, **LARGE)
    path = write_gguf(tmp_path / "model.gguf", model, dtype=dtype)
    reference = dequantized_model(path, model)
    found, exact = logprobs(path), expected_logprobs(reference)
    if dtype not in GROUPED_TYPES:
        assert (found - exact).abs().max() <= TOLERANCE
        return
    rounded = expected_logprobs(round_inputs(reference, min(32, GROUPED_TYPES[dtype].group_size)))
    assert (found - rounded).abs().max() <= ROUNDED_TOLERANCE
    assert (found - rounded).abs().median() <= TOLERANCE
    assert (found - exact).abs().mean() <= LOST_BY_ROUNDING


def test_a_model_of_several_types_with_a_tied_head(tmp_path):
    """As SmolLM2's file: the embedding in another type than the layers, looked up as plain numbers, and multiplied in its own type."""
    model = make_tiny_model(sliding_window=None, tie_word_embeddings=True, **LARGE)
    kinds = {"embed": "Q8_0", "v_proj": "Q6_K", "gate_proj": "F16", "up_proj": "Q5_0", "": "Q4_1"}
    path = write_gguf(tmp_path / "model.gguf", model, dtype=kinds)
    exact = expected_logprobs(dequantized_model(path, model))
    assert (logprobs(path) - exact).abs().mean() <= LOST_BY_ROUNDING


@pytest.mark.group
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_every_kind_of_type(tmp_path, size):
    """Each rank reads its rows and columns, which divide blocks of 256; three ranks have 2 or 3 units of 32 of the 8 columns."""
    heads = {"num_attention_heads": 24, "num_key_value_heads": 12} if size == 3 else {}
    model = make_tiny_model(sliding_window=None, **LARGE, **heads)
    kinds = {"down_proj": "Q4_K", "o_proj": "Q6_K", "up_proj": "TQ2_0", "v_proj": "IQ2_XS", "": "Q5_1"}
    path = write_gguf(tmp_path / "model.gguf", model, dtype=kinds)
    exact = expected_logprobs(dequantized_model(path, model))

    def program(tp):
        runner = build_runner(make_config(path, tensor_parallel_size=size), tp)
        runner.allocate_kv_cache()
        if tp.rank:
            return run_follower(runner, tp)
        core = EngineCore(runner.config, runner, tp)
        found = prompt_logprobs(core)
        core.shutdown()
        return found

    assert (run_ranks(size, program)[0] - exact).abs().mean() <= LOST_BY_ROUNDING


def test_a_split_model_answers_as_the_whole(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf")
    part = write_gguf(tmp_path / "split.gguf", split_max_tensors=7)
    assert torch.equal(logprobs(part), logprobs(whole))


LLAMA = {"num_hidden_layers": 1, "max_position_embeddings": 4096}


def llama(**rope):
    """transformers' own Llama, with scaled rotary embedding."""
    config = LlamaConfig(**{**TINY, **LLAMA}, rope_parameters={"rope_theta": 10_000.0, **rope})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_linear_scaling(tmp_path):
    model = llama(rope_type="linear", factor=4.0)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "model.gguf", model, dtype="F32", metadata=scaling)
    assert (logprobs(path) - expected_logprobs(model)).abs().max() <= TOLERANCE


def test_yarn(tmp_path):
    """llama.cpp magnifies keys and queries by the logarithm of the factor, as transformers does."""
    model = llama(rope_type="yarn", factor=8.0, original_max_position_embeddings=16)
    scaling = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    path = write_gguf(tmp_path / "model.gguf", model, dtype="F32", metadata=scaling)
    assert (logprobs(path) - expected_logprobs(model)).abs().max() <= TOLERANCE


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path):
    model = llama(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )
    plain = 10_000.0 ** (-torch.arange(0, TINY["head_dim"], 2) / TINY["head_dim"])
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype("float32")
    path = write_gguf(tmp_path / "model.gguf", model, dtype="F32", tensors={"rope_freqs.weight": factors})
    assert (logprobs(path) - expected_logprobs(model)).abs().max() <= TOLERANCE


def test_biases(tmp_path):
    """q and k have biases in llama.cpp's order of rows too."""
    config = LlamaConfig(**{**TINY, **LLAMA}, attention_bias=True, mlp_bias=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    path = write_gguf(tmp_path / "model.gguf", model, dtype="F32")
    assert (logprobs(path) - expected_logprobs(model)).abs().max() <= TOLERANCE
