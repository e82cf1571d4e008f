"""Random weights in every form that the kernels read."""

from dataclasses import dataclass

import torch

from workers.kernels.grouped.packed import NumBits, PackedWeight, pack


@dataclass(frozen=True)
class Form:
    """group_size None: one scale for a row."""

    num_bits: NumBits
    group_size: int | None
    has_minima: bool = False
    halves: bool = True
    is_float8: bool = False


FORMS = [
    Form(4, 32),
    Form(4, 32, has_minima=True),
    Form(4, 64),
    Form(4, 128, has_minima=True, halves=False),
    Form(4, 32, has_minima=True, halves=False),
    Form(4, 256, halves=False),
    Form(4, None),
    Form(8, 32),
    Form(8, 32, has_minima=True, halves=False),
    Form(8, 128),
    Form(8, None, halves=False),
    Form(8, None, halves=False, is_float8=True),
    Form(8, 128, halves=False, is_float8=True),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(form: Form, out_features: int, in_features: int, *, seed: int = 0):
    """values, scales and minima as `pack` takes them."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = in_features // (form.group_size or in_features)
    if form.is_float8:
        values = (randn(out_features, in_features, seed=seed) * 50).to(torch.float8_e4m3fn)
        values[0, :2] = torch.tensor([0.001953125, -448.0])  # the smallest, which has no leading 1, and the largest
    else:
        lowest, highest = (-128, 127) if form.num_bits == 8 else (0, 15) if form.has_minima else (-8, 7)
        values = torch.randint(lowest, highest + 1, (out_features, in_features), generator=generator, dtype=torch.int8)
        values[0, 0], values[0, 1] = lowest, highest
    dtype = torch.float16 if form.halves else torch.float32
    scales = (randn(out_features, num_groups, seed=seed + 1) * 0.01).to(dtype)
    minima = (randn(out_features, num_groups, seed=seed + 2) * 0.1).to(dtype) if form.has_minima else None
    return values, scales, minima


def packed(form: Form, out_features: int, in_features: int, *, seed: int = 0) -> PackedWeight:
    values, scales, minima = stored(form, out_features, in_features, seed=seed)
    return pack(values, scales, minima, num_bits=form.num_bits)
