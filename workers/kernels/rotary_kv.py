"""Rotary embedding and the write to the KV cache in one launch, in Triton. The specification is `layer_specification.rotary_kv`.

One program computes HEADS heads of one token. A head's element is computed from its pair alone, so its bits depend on nothing else.
"""

import torch
import triton
import triton.language as tl

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
    token_stride,
    head_stride,
    angle_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]  # the pair (i, i + HALF_DIM)
    is_pair = i < HALF_DIM
    is_query = (heads < NUM_HEADS) & is_pair
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS) & is_pair
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & is_pair

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
    slot = tl.load(slot_mapping_ptr + token) * NUM_KV_HEADS
    k = k_cache_ptr + (slot + heads - NUM_HEADS) * HEAD_DIM
    tl.store(k + i, rotated_first, mask=is_key)
    tl.store(k + HALF_DIM + i, rotated_second, mask=is_key)
    v = v_cache_ptr + (slot + heads - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
    tl.store(v + i, first, mask=is_value)
    tl.store(v + HALF_DIM + i, second, mask=is_value)


def rotary_kv(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    *,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `layer_specification.rotary_kv`. The queries that it returns are contiguous."""
    k_cache, v_cache = kv_cache
    cos, sin = angles
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_tokens, num_rows, _ = qkv.shape
    num_heads = num_rows - 2 * num_kv_heads
    assert qkv.stride(2) == 1 and cos.stride() == sin.stride() and cos.stride(2) == 1, "elements must be adjacent"
    assert k_cache.is_contiguous() and v_cache.is_contiguous(), "the caches must be contiguous"
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    rotary_kv_kernel[(num_tokens, triton.cdiv(num_rows, HEADS))](
        qkv,
        cos,
        sin,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        HEADS=HEADS,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
        enable_fp_fusion=False,  # as the specification rounds
    )
    return q
