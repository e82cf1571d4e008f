"""Small whole numbers packed into 32-bit words, as the quantised formats keep them. Knows bits and orders; no files and no names."""

import torch

# AWQ's order in a word: its 4 bits from the lowest on belong to these of 8 columns.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """words: [n, m] int32; each becomes 32 / num_bits numbers in its row, the lowest bits first. Returns them as uint8.

    Of 4 bits, [[0x76543210]] becomes [[0, 1, 2, 3, 4, 5, 6, 7]].
    """
    assert words.dim() == 2 and words.dtype is torch.int32
    # By bytes, which are in the same order as the bits of a word.
    numbers = words.contiguous().view(torch.uint8)
    if num_bits == 8:
        return numbers
    assert num_bits == 4
    unpacked = torch.empty((len(words), 8 * words.shape[1]), dtype=torch.uint8)
    torch.bitwise_and(numbers, 15, out=unpacked[:, ::2])
    torch.bitwise_right_shift(numbers, 4, out=unpacked[:, 1::2])
    return unpacked


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """words: [n, m] int32 -> [8 * m, n] uint8, 4 bits each in AWQ's order: [[0x75316420]] becomes the column 0 to 7."""
    turned = words.T.contiguous()
    numbers = torch.empty((8 * len(turned), turned.shape[1]), dtype=torch.uint8)
    for place, column in enumerate(AWQ_ORDER):
        numbers[column::8] = (turned >> (4 * place)) & 15
    return numbers
