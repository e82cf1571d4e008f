"""Adapters beside weights that the checkpoint keeps in few bits: the logits of PEFT's merge with the dequantized weights, and the same bits
in any company.
"""

import pytest
import torch
from support.checkpoints.adapters import write_adapter, write_with_peft
from support.checkpoints.gguf_files import LARGE, dequantized_model, write_gguf
from support.checkpoints.quantized.checkpoints import write_quantized
from support.checkpoints.tiny import make_tiny_model
from support.fakes.engines import make_engine, make_request
from support.logits import all_logits
from support.native import native_library
from transformers import AutoModelForCausalLM

from workers.checkpoint.model_config import load_model_config
from workers.engine.llm_engine import stream_requests
from workers.lora.peft_config import MODULES
from workers.protocol import GenerateRequest

PROMPT = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()
SETTINGS = {"enable_lora": True, "max_lora_rank": 16, "num_threads": 1, "enable_prefix_caching": False}
# Products of whole numbers round their inputs to 8 bits; those that become dense do not.
EXACT, ROUNDED = 2e-5, 0.03
BASES = {
    "gptq": ROUNDED,
    "gptq, groups of 16": EXACT,
    "gguf F16": EXACT,
    "gguf Q4_0": ROUNDED,
}


def write_base(folder, name):
    """The checkpoint's path, and its weights in transformers' model."""
    if name.startswith("gguf"):
        model = make_tiny_model(sliding_window=None, **LARGE)
        path = write_gguf(folder / "model.gguf", model, dtype=name.split()[1])
        return path, dequantized_model(path, model)
    quantized, meant = write_quantized(folder, name, sliding_window=None)
    return quantized, AutoModelForCausalLM.from_pretrained(meant, dtype=torch.float32).eval()


def distance(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", BASES)
def test_logits_are_those_of_the_merged_weights(name, tmp_path):
    path, dense = write_base(tmp_path, name)
    with torch.inference_mode():
        without = dense(torch.tensor([PROMPT])).logits[0]
    kind = {"r": 7, "lora_alpha": 10, "target_modules": list(MODULES)}
    merged = write_with_peft(tmp_path / "adapter", dense, **kind)
    with torch.inference_mode():
        expected = merged(torch.tensor([PROMPT])).logits[0]
    assert distance(without, expected) > 0.2, "the adapter matters"
    engine = make_engine(path, **SETTINGS)
    engine.load_adapter("support", tmp_path / "adapter")
    (revision,) = engine.core.runner.adapters.revisions()
    assert distance(all_logits(engine.core, PROMPT, adapter=revision), expected) < BASES[name]
    assert distance(all_logits(engine.core, PROMPT), without) < BASES[name]


@pytest.mark.parametrize("name", ["gptq", "gguf Q4_0"])
def test_rows_over_adapters_and_the_base_have_the_bits_of_each_alone(name, tmp_path):
    native_library("avx2")
    path, _ = write_base(tmp_path, name)
    model = load_model_config(path)
    folders = [write_adapter(tmp_path / str(i), model, seed=i, rank=4 * i + 1, strength=0.1) for i in range(3)]
    together, alone = make_engine(path, **SETTINGS), make_engine(path, **SETTINGS, max_num_seqs=1, max_loras=1)
    plain = make_engine(path, num_threads=1, enable_prefix_caching=False, max_num_seqs=1)
    revisions: list[str | None] = [together.load_adapter(f"a{i}", folder) for i, folder in enumerate(folders)]
    for i, folder in enumerate(folders):
        alone.load_adapter(f"a{i}", folder)
    revisions.append(None)

    def request(i: int) -> GenerateRequest:
        made = make_request(str(i), PROMPT[: 5 + 3 * i], max_tokens=6, logprobs=2)
        return GenerateRequest(
            request_id=str(i), prompt_token_ids=made.prompt_token_ids, sampling=made.sampling, adapter=revisions[i % 4]
        )

    def outputs(engine, requests):
        found = {r.request_id: [] for r in requests}
        for delta in stream_requests(engine.core, requests):
            found[delta.request_id] += zip(delta.token_ids, delta.logprobs, strict=True)
        return found

    requests = [request(i) for i in range(8)]
    whole = outputs(together, requests)
    for r in requests:
        engine = plain if r.adapter is None else alone
        assert outputs(engine, [r])[r.request_id] == whole[r.request_id], r.adapter
