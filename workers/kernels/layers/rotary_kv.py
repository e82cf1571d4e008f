"""Rotary embedding and the write to the KV cache in one launch, in Triton. The specification is `layer_specification.rotary_kv`.

One program computes HEADS heads of one token. A head's element is computed from its pair alone, and in 8 bits from its head, so its bits
depend on nothing else.
"""

import torch
import triton
import triton.language as tl

from workers.kernels.quantized_kv import Cache
from workers.kernels.triton_kv import encode, find_scale, kernel_arguments, size_bits

HEADS = 8


@triton.jit
def rotary_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slot_mapping_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    token_stride,
    head_stride,
    angle_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]  # the pair (i, i + HALF_DIM)
    is_pair = i < HALF_DIM
    is_query = (heads < NUM_HEADS) & is_pair
    is_key_head = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_value_head = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
    is_key = is_key_head & is_pair
    is_value = is_value_head & is_pair

    row = qkv_ptr + token * token_stride + heads * head_stride
    first = tl.load(row + i, mask=is_query | is_key | is_value, other=0.0)
    second = tl.load(row + HALF_DIM + i, mask=is_query | is_key | is_value, other=0.0)
    # The second half of the angles: sin is negative in the first.
    cos = tl.load(cos_ptr + token * angle_stride + HALF_DIM + i, mask=is_pair, other=0.0)
    sin = tl.load(sin_ptr + token * angle_stride + HALF_DIM + i, mask=is_pair, other=0.0)
    rotated_first = (first.to(tl.float32) * cos - second.to(tl.float32) * sin).to(first.dtype)
    rotated_second = (second.to(tl.float32) * cos + first.to(tl.float32) * sin).to(first.dtype)

    HEAD_DIM: tl.constexpr = 2 * HALF_DIM
    q = q_ptr + (token * NUM_HEADS + heads) * HEAD_DIM
    tl.store(q + i, rotated_first, mask=is_query)
    tl.store(q + HALF_DIM + i, rotated_second, mask=is_query)
    slot = tl.load(slot_mapping_ptr + token)
    k_head = heads - NUM_HEADS
    v_head = k_head - NUM_KV_HEADS
    k_first, k_second, v_first, v_second = rotated_first, rotated_second, first, second
    if FORM != "auto":
        # A head is a key or a value, so one scale serves both.
        first = tl.where(is_key, rotated_first, first)
        second = tl.where(is_key, rotated_second, second)
        largest = tl.max(tl.maximum(size_bits(first), size_bits(second)), axis=1, keep_dims=True)
        scale = find_scale(largest, FORM)
        k_first = encode(first, scale, FORM)
        k_second = encode(second, scale, FORM)
        v_first, v_second = k_first, k_second
        block, offset = slot // BLOCK_SIZE * NUM_KV_HEADS, slot % BLOCK_SIZE
        tl.store(k_scales_ptr + (block + k_head) * BLOCK_SIZE + offset, scale, mask=is_key_head)
        tl.store(v_scales_ptr + (block + v_head) * BLOCK_SIZE + offset, scale, mask=is_value_head)
    k = k_cache_ptr + (slot * NUM_KV_HEADS + k_head) * HEAD_DIM
    tl.store(k + i, k_first, mask=is_key)
    tl.store(k + HALF_DIM + i, k_second, mask=is_key)
    v = v_cache_ptr + (slot * NUM_KV_HEADS + v_head) * HEAD_DIM
    tl.store(v + i, v_first, mask=is_value)
    tl.store(v + HALF_DIM + i, v_second, mask=is_value)


def rotary_kv(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    *,
    kv_cache: tuple[Cache, Cache],
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `layer_specification.rotary_kv`. The queries that it returns are contiguous."""
    (k_values, k_scales, form), (v_values, v_scales, _) = map(kernel_arguments, kv_cache)
    cos, sin = angles
    _, block_size, num_kv_heads, head_dim = k_values.shape
    num_tokens, num_rows, _ = qkv.shape
    num_heads = num_rows - 2 * num_kv_heads
    assert qkv.stride(2) == 1 and cos.stride() == sin.stride() and cos.stride(2) == 1, "elements must be adjacent"
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    rotary_kv_kernel[(num_tokens, triton.cdiv(num_rows, HEADS))](
        qkv,
        cos,
        sin,
        slot_mapping,
        q,
        k_values,
        v_values,
        k_scales,
        v_scales,
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        HEADS=HEADS,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        FORM=form,
        num_warps=4,
        enable_fp_fusion=False,  # as the specification rounds
    )
    return q
