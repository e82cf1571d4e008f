"""The depth and the number of values of a JSON text are counted the same wherever the windows cut it, and in little memory."""

import json
import random
import tracemalloc

import pytest

from cluster.api.schemas.parsing import structure
from cluster.api.schemas.parsing.structure import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, WINDOW_BYTES, check_structure
from workers.errors import RequestError

MIB = 2**20


def count_one_by_one(text: bytes) -> tuple[int, int]:
    """The specification: the greatest depth, and the lists, objects and commas outside of strings."""
    depth = deepest = num_values = 0
    in_string, num_backslashes = False, 0
    for byte in text:
        if byte == ord('"') and num_backslashes % 2 == 0:
            in_string = not in_string
        num_backslashes = num_backslashes + 1 if byte == ord("\\") else 0
        if in_string:
            continue
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
        num_values += byte in b"[{,"
    return deepest, num_values


@pytest.mark.parametrize("window_bytes", [1, 2, 3, 7, 64])
def test_windows_change_nothing(monkeypatch, window_bytes):
    monkeypatch.setattr(structure, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(structure, "MAX_DEPTH", 3)
    monkeypatch.setattr(structure, "MAX_VALUES", 12)
    rng = random.Random(window_bytes)
    for _ in range(1000):
        text = bytes(rng.choices(b'[]{},"\\a ', k=rng.randint(0, 40)))
        depth, num_values = count_one_by_one(text)
        if depth > 3 or num_values > 12:
            with pytest.raises(RequestError):
                check_structure(text)
        else:
            check_structure(text)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, True),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), False),
        (b'"' + b"[" * 3 * WINDOW_BYTES + b'"', True),
        (b'"' + b"\\" * (2 * WINDOW_BYTES) + b'"', True),
        (b'"' + b"\\" * (2 * WINDOW_BYTES + 1) + b'"' + b"[" * 1000 + b'"', True),  # the second quote is escaped
        (b'"' + b"\\" * (2 * WINDOW_BYTES) + b'"' + b"[" * 1000, False),
        (b"[" + b"{}," * (MAX_CONTAINERS - 2) + b"{}]", True),
        (b"[" + b"{}," * MAX_CONTAINERS + b"{}]", False),
        (b"[" + b"1," * (MAX_VALUES - 1) + b"1]", True),
        (b"[" + b"1," * MAX_VALUES + b"1]", False),
        (b"", True),
    ],
)
def test_limits(text, fits):
    if fits:
        check_structure(text)
    else:
        with pytest.raises(RequestError):
            check_structure(text)


def test_memory_does_not_depend_on_the_size_of_the_body():
    """Arrays as long as the body took 25 times its size, and the allocator kept them for each thread."""
    body = json.dumps(list(range(500_000))).encode()
    check_structure(body)
    tracemalloc.start()
    try:
        check_structure(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * WINDOW_BYTES, f"{peak / MIB:.1f} MiB for a body of {len(body) / MIB:.1f} MiB"
