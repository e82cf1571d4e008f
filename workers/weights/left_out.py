"""Which tensors of a checkpoint the language model does not need, in words for people. Knows names; opens no file, and no torch."""

from collections.abc import Iterable

from workers.weights.gguf import names as gguf_names
from workers.weights.names import BUFFERS, VISION


def describe_left_out(names: Iterable[str]) -> str | None:
    """names: of all tensors, as the files have them. "2 tensors for images (vision_tower)"; None if nothing is left out."""
    images = [name for name in names if VISION.fullmatch(name)]
    others = [name for name in names if BUFFERS.fullmatch(name) or gguf_names.BUFFERS.fullmatch(name)]
    parts = []
    if images:
        modules = sorted({str(m[1]).removeprefix("model.") for name in images if (m := VISION.fullmatch(name))})
        parts.append(f"{_tensors(len(images))} for images ({', '.join(modules)})")
    if others:
        parts.append(f"{_tensors(len(others))} for rotary embedding, which is computed")
    return " and ".join(parts) or None


def _tensors(number: int) -> str:
    return f"{number} tensor{'s' if number > 1 else ''}"
