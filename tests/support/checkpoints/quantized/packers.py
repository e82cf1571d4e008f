"""The formats' packing rules, number by number: a matrix becomes the tensors that a checkpoint has of it, and what they mean."""

import torch

# In a word of AWQ, bits 4 * i and on belong to this of 8 columns.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def to_int32(number):
    return number - (1 << 32) if number >= 1 << 31 else number


def pack_words(rows, num_bits, order=None):
    """rows: lists of numbers; each list becomes words, the first number in the lowest bits."""
    per_word = 32 // num_bits
    order = order or list(range(per_word))
    packed = []
    for row in rows:
        row = [*row, *[0] * (-len(row) % per_word)]
        words = []
        for first in range(0, len(row), per_word):
            word = 0
            for place in range(per_word):
                word |= row[first + order[place]] << (num_bits * place)
            words.append(to_int32(word))
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def round_groups(weight, *, num_bits, groups, symmetric, scale_dtype):
    """weight: [out, in]; groups: [in], the group of each input. Returns numbers [out, in] from 0, scales and zero points [out, groups], and
    (number - zero) * scale.
    """
    most, num_groups = (1 << num_bits) - 1, int(groups.max()) + 1
    numbers = torch.zeros(weight.shape, dtype=torch.int64)
    scales, zeros = torch.zeros(len(weight), num_groups), torch.zeros(len(weight), num_groups, dtype=torch.int64)
    for group in range(num_groups):
        part = weight[:, groups == group].float()
        if symmetric:
            scale = (part.abs().amax(dim=1) / (most // 2)).to(scale_dtype).float()
            zero = torch.full((len(weight),), (most + 1) // 2)
        else:
            low, high = part.amin(dim=1).clamp(max=-1e-6), part.amax(dim=1).clamp(min=1e-6)
            scale = ((high - low) / most).to(scale_dtype).float()
            zero = (-low / scale).round().clamp(1, most).long()
        numbers[:, groups == group] = ((part / scale[:, None]).round() + zero[:, None]).clamp(0, most).long()
        scales[:, group], zeros[:, group] = scale, zero
    meant = ((numbers - zeros[:, groups]).double() * scales[:, groups].double()).float()
    return numbers, scales.to(scale_dtype), zeros, meant


def gptq(
    weight, *, num_bits=4, group_size=32, symmetric=True, act_order=False, less_one=True, scale_dtype=torch.float16
):
    """less_one: zero points are kept less one, in the format "gptq"."""
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    groups = torch.arange(in_features) // size
    if act_order:
        groups = groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
    numbers, scales, zeros, meant = round_groups(
        weight, num_bits=num_bits, groups=groups, symmetric=symmetric, scale_dtype=scale_dtype
    )
    kept = zeros - 1 if less_one else zeros
    tensors = {
        "qweight": pack_words(numbers.tolist(), num_bits).T.contiguous(),
        "qzeros": pack_words(kept.T.tolist(), num_bits),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return tensors, meant


def awq(weight, *, group_size=32, scale_dtype=torch.float16):
    groups = torch.arange(weight.shape[1]) // group_size
    numbers, scales, zeros, meant = round_groups(
        weight, num_bits=4, groups=groups, symmetric=False, scale_dtype=scale_dtype
    )
    tensors = {
        "qweight": pack_words(numbers.T.tolist(), 4, AWQ_ORDER),
        "qzeros": pack_words(zeros.T.tolist(), 4, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }
    return tensors, meant


def pack_quantized(weight, *, num_bits=4, group_size=32, symmetric=True, act_order=False, scale_dtype=torch.bfloat16):
    """compressed-tensors' "pack-quantized". group_size None: one scale for each row."""
    in_features = weight.shape[1]
    groups = torch.arange(in_features) // (group_size or in_features)
    if act_order:
        groups = groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
    numbers, scales, zeros, meant = round_groups(
        weight, num_bits=num_bits, groups=groups, symmetric=symmetric, scale_dtype=scale_dtype
    )
    tensors = {
        "weight_packed": pack_words(numbers.tolist(), num_bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if act_order:
        tensors["weight_g_idx"] = groups.int()
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(zeros.T.tolist(), num_bits).T.contiguous()
    return tensors, meant


def int_quantized(weight, *, group_size=None, symmetric=True, scale_dtype=torch.bfloat16):
    """compressed-tensors' "int-quantized": a byte each. group_size None: one scale for each row."""
    groups = torch.arange(weight.shape[1]) // (group_size or weight.shape[1])
    numbers, scales, zeros, meant = round_groups(
        weight, num_bits=8, groups=groups, symmetric=symmetric, scale_dtype=scale_dtype
    )
    tensors = {"weight": (numbers - 128).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return tensors, meant


def float8(weight, *, per="tensor", block_size=(32, 32), name="weight_scale", static=False):
    """per: "tensor", "row" or "block"."""
    rows, inputs = {"tensor": weight.shape, "row": (1, weight.shape[1]), "block": block_size}[per]
    num_rows, num_inputs = -(-weight.shape[0] // rows), -(-weight.shape[1] // inputs)
    scales = torch.zeros(num_rows, num_inputs)
    values, meant = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros(weight.shape)
    for i in range(num_rows):
        for j in range(num_inputs):
            place = slice(i * rows, (i + 1) * rows), slice(j * inputs, (j + 1) * inputs)
            scales[i, j] = weight[place].float().abs().max() / 448
            values[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[place] = values[place].float() * scales[i, j]
    tensors = {"weight": values, name: scales.reshape(()) if per == "tensor" else scales}
    if static:
        tensors["input_scale"] = torch.tensor(0.5)
    return tensors, meant
