"""Small whole numbers packed into 32-bit words, as the quantised formats keep them. Knows bits and orders; no files and no names."""

import torch

# AWQ's order in a word: its 4 bits from the lowest on belong to these of 8 columns.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: torch.Tensor, num_bits: int, *, dim: int) -> torch.Tensor:
    """words: [n, m] int32; along `dim`, each becomes 32 / num_bits numbers, the lowest bits first. Returns them as uint8.

    Of 4 bits along dim 1, [[0x76543210]] becomes [[0, 1, 2, 3, 4, 5, 6, 7]].
    """
    assert words.dim() == 2 and dim in (0, 1) and words.dtype is torch.int32
    # By bytes, which are in the same order as the bits of a word.
    numbers = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    if num_bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=3).flatten(2)
    else:
        assert num_bits == 8
    # numbers: [n, m, 32 / num_bits]
    return numbers.flatten(1) if dim == 1 else numbers.transpose(1, 2).flatten(0, 1)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """words: [n, m] int32 -> [n, 8 * m] uint8, 4 bits each in AWQ's order: [[0x75316420]] becomes [[0, 1, 2, 3, 4, 5, 6, 7]]."""
    places = [AWQ_ORDER.index(column) for column in range(8)]
    return unpack(words, 4, dim=1).unflatten(1, (-1, 8))[:, :, places].flatten(1)
