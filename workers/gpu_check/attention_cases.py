"""Each attention backend against the specification on the CPU, and each query's bits alone, among others and chunked."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, get_args

import numpy as np
import torch

from workers.attention.backend import AttentionBackend, AttentionMetadata
from workers.attention.sdpa import SdpaBackend
from workers.attention.select import select_backend
from workers.config import AttentionChoice, KVCacheDtype
from workers.gpu_check.report import Report
from workers.kernels.quantized_kv import KV_DTYPES, QuantizedKV

# Relative to the largest value of the specification's result, which is computed in float32 from the same bf16 inputs.
TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    group: int
    head_dim: int
    window: int | None
    block_size: int
    num_kv_heads: int = 2
    kv: KVCacheDtype = "auto"

    def __str__(self) -> str:
        form = "" if self.kv == "auto" else f", KV in {self.kv}"
        return f"GQA {self.group}, head_dim {self.head_dim}, window {self.window}, blocks of {self.block_size}{form}"


SHAPES = [
    Shape(group=group, head_dim=head_dim, window=window, block_size=block_size)
    for group, head_dim, window, block_size in itertools.product((1, 4, 8), (64, 128), (None, 1, 100, 4096), (16, 256))
]
KV_SHAPES = [
    Shape(group=group, head_dim=head_dim, window=window, block_size=16, kv=kv)
    for kv, group, head_dim, window in itertools.product(get_args(KVCacheDtype)[1:], (1, 4), (64, 128), (None, 100))
]
# (tokens computed before, new tokens) of each sequence.
MIXED = ((0, 1), (37, 1), (0, 70), (300, 33), (5000, 1), (0, 17), (255, 1), (256, 2))


MakeBackend = Callable[["Shape"], AttentionBackend]


class Case:
    """A cache with every sequence's keys and values in permuted blocks; slots that no sequence uses hold NaN."""

    def __init__(self, shape: Shape, sequences: Sequence[tuple[int, int]], *, seed: int = 0) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.shape, self.sequences = shape, sequences
        size = shape.block_size
        needed = [-(-(before + new) // size) for before, new in sequences]
        free = list(range(1, sum(needed) + 1))
        rng.shuffle(free)
        self.tables = [[free.pop() for _ in range(n)] for n in needed]
        self.caches = torch.full(
            (2, sum(needed) + 1, size, shape.num_kv_heads, shape.head_dim), torch.nan, dtype=torch.bfloat16
        )
        # The null block is padding, which the engine keeps at zeros.
        self.caches[:, 0] = 0
        self.queries = []
        for (before, new), table in zip(sequences, self.tables, strict=True):
            slots = torch.tensor([table[p // size] * size + p % size for p in range(before + new)])
            values = torch.randn((2, len(slots), *self.caches.shape[3:]), generator=generator).bfloat16()
            self.caches.view(2, -1, *self.caches.shape[3:])[:, slots] = values
            num_heads = shape.num_kv_heads * shape.group
            self.queries.append(torch.randn(new, num_heads, shape.head_dim, generator=generator).bfloat16())

    def run(
        self, backend: AttentionBackend, device: torch.device, parts: Sequence[tuple[int, int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Results [new, num_heads, head_dim] of each part. parts: (sequence, first new token, end); None: all of every sequence."""
        parts = parts or [(i, 0, new) for i, (_, new) in enumerate(self.sequences)]
        width = max(len(self.tables[i]) for i, _, _ in parts)
        table = np.zeros((len(parts), width), dtype=np.int32)
        for row, (i, _, _) in enumerate(parts):
            table[row, : len(self.tables[i])] = self.tables[i]
        query_lens = [end - start for _, start, end in parts]
        seq_lens = [self.sequences[i][0] + end for i, _, end in parts]

        def ints(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype).to(device)

        metadata = AttentionMetadata(
            slot_mapping=ints(np.zeros(sum(query_lens)), torch.int64),
            block_table=ints(table),
            seq_lens=ints(seq_lens),
            cu_seqlens_q=ints(np.concatenate([[0], np.cumsum(query_lens)])),
            query_lens=query_lens,
            context_lens=seq_lens,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
        )
        q = torch.cat([self.queries[i][start:end] for i, start, end in parts]).to(device)
        keys, values = (cache.to(device) for cache in self.in_form())
        return list(backend.forward(q, keys, values, metadata).cpu().split(query_lens))

    def in_form(self) -> list[torch.Tensor] | list[QuantizedKV]:
        """Keys and values as the shape says."""
        if self.shape.kv == "auto":
            return list(self.caches)
        return [QuantizedKV.of(cache, KV_DTYPES[self.shape.kv]) for cache in self.caches]

    def specification(self) -> list[torch.Tensor]:
        """In float32 on the CPU. Unused slots are zeros here: the specification's products span whole tiles."""
        shape = self.shape
        sdpa = SdpaBackend(**sizes(shape))
        exact = Case.__new__(Case)
        exact.shape, exact.sequences, exact.tables = replace(shape, kv="auto"), self.sequences, self.tables
        caches = [cache if isinstance(cache, torch.Tensor) else cache.dequantize() for cache in self.in_form()]
        exact.caches, exact.queries = torch.stack(caches).float().nan_to_num(0.0), [q.float() for q in self.queries]
        return exact.run(sdpa, torch.device("cpu"))


class Sizes(TypedDict):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


def sizes(shape: Shape) -> Sizes:
    return {
        "num_heads": shape.num_kv_heads * shape.group,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "sliding_window": shape.window,
    }


def selected(choice: AttentionChoice, device: torch.device) -> MakeBackend:
    """The backend as the engine makes it. The function raises ConfigError for a shape that the backend cannot run."""

    def make(shape: Shape) -> AttentionBackend:
        dtype, block_size = torch.bfloat16, shape.block_size
        return select_backend(
            device=device,
            dtype=dtype,
            block_size=block_size,
            choice=choice,
            kv_cache_dtype=shape.kv,
            **sizes(shape),
        ).backend

    return make


def check_values(
    report: Report, name: str, make: MakeBackend, device: torch.device, shapes: Sequence[Shape] = SHAPES
) -> None:
    worst, wrong = 0.0, []
    for shape in shapes:
        case = Case(shape, MIXED)
        expected = torch.cat(case.specification())
        got = torch.cat(case.run(make(shape), device)).float()
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, error)
        if not error < TOLERANCE:  # NaN is wrong, too
            wrong.append(f"{shape}: {error:.3g}")
    report.check(f"{name} against sdpa, {len(shapes)} shapes", not wrong, "; ".join(wrong[:3]), worst_error=worst)


def check_bits(
    report: Report, name: str, make: MakeBackend, device: torch.device, shapes: Sequence[Shape] = SHAPES
) -> None:
    """A query's result alone and with its prefill in chunks has the bits that it has among 64 sequences."""
    wrong = []
    for shape in shapes:
        rng = random.Random(1)
        case = Case(shape, [*MIXED, *((rng.randrange(600), 1) for _ in range(64 - len(MIXED)))])
        backend = make(shape)
        together = case.run(backend, device)
        for i, (_, new) in enumerate(case.sequences[:12]):
            alone = case.run(backend, device, [(i, 0, new)])[0]
            cuts = sorted({0, *rng.sample(range(new + 1), min(3, new)), new})
            chunks = [case.run(backend, device, [(i, a, b)])[0] for a, b in itertools.pairwise(cuts)]
            if not (torch.equal(alone, together[i]) and torch.equal(torch.cat(chunks), together[i])):
                wrong.append(f"{shape}, sequence {i}")
                break
    report.check(f"{name}: bits alone, among 64, chunked; {len(shapes)} shapes", not wrong, "; ".join(wrong[:3]))
