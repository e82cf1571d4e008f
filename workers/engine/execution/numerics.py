"""A fingerprint of the last bits that a replica computes: replicas with the same one give a token the same logits.

It is made of results, not guessed from the names of CPUs: the loaded model's first layer, last norm and head compute fixed rows with the
kernels and the packed weights that serve. What differs anywhere (instruction set, library, data type, number of ranks, weights) shows in
the digest. Knows the model's parts; no requests and no replicas.

Rounding to a half type hides all but about one in 2**16 differences of the last bit of a sum. So there are that many elements and more.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from workers.attention.backend import AttentionMetadata
from workers.config import EngineConfig
from workers.engine.execution.model_runner import ModelRunner
from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.rows import AdapterRows, group_rows
from workers.kernels.lora.table import LoraMatrices
from workers.kernels.quantized_kv import Cache, QuantizedKV, parts_of
from workers.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from workers.lora.peft_folder import module_shapes
from workers.model.mistral import MistralLayer
from workers.sampling.logprobs import compute_logprobs

DIGEST_BYTES = 8
# Of each step, the new tokens and the whole contexts of its sequences: 1, 3 and 17 rows, and contexts across the attention's tiles of keys.
STEPS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1,), (150,)),
    ((1, 1, 1), (5, 64, 131)),
    ((17,), (83,)),
)
MAX_CONTEXT = 150
# In half types: of hidden states in all, if need be in further steps of at most so many rows.
NUM_ELEMENTS = 1 << 16
MAX_ROWS = 64
LORA_RANK = 16


def fingerprint(runner: ModelRunner) -> str | None:
    """For example "bfloat16-int8-native-tp2-5be0c1ad39f6d274" on rank 0, None on the others. Every rank calls it, after
    `allocate_kv_cache` and before its first step. Raises GroupError if a rank is gone.
    """
    config, tp = runner.config, runner.tp
    digest = _digest(runner) if tp.device.type != "cpu" else _on_one_thread(lambda: _digest(runner))
    # Each rank's own bits count, in the order of the ranks, even where the sum over ranks would round a difference away.
    gathered = tp.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(tp.device))
    if gathered is None:
        return None
    total = hashlib.blake2b(gathered.cpu().numpy().tobytes(), digest_size=DIGEST_BYTES).hexdigest()
    kv_form = None if config.kv_cache_dtype == "auto" else f"kv{config.kv_cache_dtype}"
    names = (config.dtype, config.quantization, kv_form, runner.attention_backend, f"tp{tp.size}", total)
    return "-".join(name for name in names if name is not None)


def _on_one_thread(compute: Callable[[], bytes]) -> bytes:
    """The number of threads changes no bit, and with several, OpenMP would keep some for the caller's thread: see ModelRunner.execute."""
    num_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compute()
    finally:
        torch.set_num_threads(num_before)


@torch.inference_mode()
def _digest(runner: ModelRunner) -> bytes:
    config, model, device = runner.config, runner.model, runner.tp.device
    decoder, found = model.model, hashlib.blake2b(digest_size=DIGEST_BYTES)
    layer = cast(MistralLayer, decoder.layers[0])
    keys, values = (_cache_like(cache, config, name) for cache, name in zip(runner.kv_cache[0], "kv", strict=True))
    last_rows: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> None:
        found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())

    def fixed(shape: Sequence[int], name: str) -> torch.Tensor:
        return _fixed(shape, name).to(device, runner.dtype)

    hidden_size = config.model.hidden_size
    for i, (query_lens, context_lens) in enumerate(_steps(config, is_half=runner.dtype.itemsize == 2)):
        positions, metadata = _inputs(query_lens, context_lens, block_size=config.block_size, device=device)
        rows = fixed((len(positions), hidden_size), f"rows {i}")
        hidden_states, residual = layer(rows, None, decoder.rotary.angles(positions), (keys, values), metadata)
        hidden_states, residual = decoder.norm(hidden_states, residual)
        add(hidden_states)
        add(residual)
        last_rows.append(hidden_states[metadata.cu_seqlens_q[1:].long() - 1])
    logits = model.compute_logits(torch.cat(last_rows))  # every rank takes part
    if logits is not None:
        add(logits)
        for tensor in compute_logprobs(logits, torch.zeros(len(logits), dtype=torch.int64, device=device), max_top=1):
            add(tensor)
    # What the layer wrote: this rank's own keys and values.
    for cache in (keys, values):
        for part in parts_of(cache):
            if part is not None:
                add(part)
    for linear in _linears_of_other_forms(model, layer):
        add(linear.method.apply(linear, fixed((MAX_ROWS, _num_inputs(linear)), "other form")))
    for tensor in _adapter_outputs(runner, fixed):
        add(tensor)
    shape = (math.ceil(NUM_ELEMENTS / hidden_size), hidden_size)
    for tensor in decoder.norm(fixed(shape, "x"), fixed(shape, "residual")):
        add(tensor)
    gates = _all_numbers(runner.dtype).to(device)
    add(layer.mlp.kernels.silu_mul(torch.cat((gates, torch.ones_like(gates)), dim=-1)))
    return found.digest()


Linear = MergedColumnParallelLinear | RowParallelLinear


def _linears_of_other_forms(model: nn.Module, first: nn.Module) -> Iterator[Linear]:
    """The first of each form of weights that the first layer does not have, with kernels of its own: the numbers of a matrix may decide its
    form. None in most models.
    """

    def form(linear: Linear) -> tuple[torch.dtype, ...]:
        return tuple(parameter.dtype for parameter in linear.parameters(recurse=False))

    seen = {form(linear) for linear in first.modules() if isinstance(linear, Linear)}
    for linear in (linear for linear in model.modules() if isinstance(linear, Linear)):
        if form(linear) not in seen:
            seen.add(form(linear))
            yield linear


def _num_inputs(linear: Linear) -> int:
    if isinstance(linear, MergedColumnParallelLinear):
        return linear.input_size
    return len(range(*linear.columns.indices(linear.input_size)))


def _adapter_outputs(
    runner: ModelRunner, fixed: Callable[[Sequence[int], str], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """What a fixed adapter adds in the first layer; nothing where there are none. Leaves the slots empty, as they are."""
    adapters = runner.adapters
    if adapters is None:
        return
    for layer in (layer for layer in adapters.layers if layer.layer == 0):
        sizes = [module.share_of(*module_shapes(runner.config.model)[module.name]) for module in layer.modules]
        num_inputs, num_outputs = sizes[0][1], sum(outputs for outputs, _ in sizes)
        parts = [
            LoraMatrices(fixed((LORA_RANK, num_inputs), "a").cpu(), fixed((outputs, LORA_RANK), "b").cpu(), 0.25)
            for outputs, _ in sizes
        ]
        layer.table.put(0, layer.table.prepare(parts, HostMemory()))
        rows = (
            torch.from_numpy(x).to(runner.tp.device)
            for x in group_rows(np.arange(MAX_ROWS) % 2 - 1, adapters.num_slots)
        )
        out = fixed((MAX_ROWS, num_outputs), "out")
        layer.table.add(out, fixed((MAX_ROWS, num_inputs), "in"), AdapterRows(*rows))
        layer.table.put(0, None)
        yield out


def _steps(config: EngineConfig, *, is_half: bool) -> list[tuple[list[int], list[int]]]:
    """STEPS, and what else half types need, cut to what a model of this length can hold."""
    num_rows = sum(sum(query_lens) for query_lens, _ in STEPS)
    num_missing = max(0, math.ceil(NUM_ELEMENTS / config.model.hidden_size) - num_rows) if is_half else 0
    more = [((min(MAX_ROWS, num_missing),), (MAX_CONTEXT,))] * math.ceil(num_missing / MAX_ROWS)
    steps: list[tuple[list[int], list[int]]] = []
    for query_lens, context_lens in (*STEPS, *more):
        # By the context: two sequences that end at the same position would write to the same slot.
        pairs = zip(query_lens, context_lens, strict=True)
        lens = {min(context, config.max_model_len): query for query, context in pairs}
        steps.append(([min(query, context) for context, query in lens.items()], list(lens)))
    return steps


def _inputs(
    query_lens: Sequence[int], context_lens: Sequence[int], *, block_size: int, device: torch.device
) -> tuple[torch.Tensor, AttentionMetadata]:
    """The positions of a step, and its metadata. All sequences share blocks 1, 2, 3 and so on: what is in them need not make sense."""
    pairs = list(zip(query_lens, context_lens, strict=True))
    positions = torch.tensor([p for query, context in pairs for p in range(context - query, context)], device=device)
    num_blocks = math.ceil(max(context_lens) / block_size)
    table = torch.arange(1, num_blocks + 1, dtype=torch.int32, device=device)
    metadata = AttentionMetadata(
        slot_mapping=positions + block_size,
        block_table=table.repeat(len(pairs), 1),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor(
            [sum(query_lens[:i]) for i in range(len(pairs) + 1)], dtype=torch.int32, device=device
        ),
        query_lens=list(query_lens),
        context_lens=list(context_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(context_lens),
    )
    return positions, metadata


def _cache_like(cache: Cache, config: EngineConfig, name: str) -> Cache:
    """Fixed keys or values of one layer, in blocks of the form of `cache`, with the null block and those that `_inputs` names."""
    num_blocks = 1 + math.ceil(min(MAX_CONTEXT, config.max_model_len) / config.block_size)
    fixed = _fixed((num_blocks, *cache.shape[1:]), name)
    if isinstance(cache, torch.Tensor):
        return fixed.to(cache.device, cache.dtype)
    return QuantizedKV.of(fixed, cache.dtype).to(cache.values.device)


def _all_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a half type, or in fp32 those of bfloat16. [128, n]"""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    numbers = patterns.to(torch.int16).view(dtype) if dtype.itemsize == 2 else (patterns << 16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    return numbers[: len(numbers) // 128 * 128].view(128, -1)


def _fixed(shape: Sequence[int], name: str) -> torch.Tensor:
    """Numbers from -1 to 1 in fp32 that follow from the name. From a hash: torch's normal distribution differs between instruction sets."""
    data = bytearray(hashlib.shake_128(name.encode()).digest(2 * math.prod(shape)))
    return torch.frombuffer(data, dtype=torch.int16).view(*shape).float() / 2**15
