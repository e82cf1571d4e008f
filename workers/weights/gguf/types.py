"""The forms of ggml's types, for the methods of quant/. Knows no bytes (see blocks.py), no files and no torch."""

from dataclasses import asdict, replace

from workers.checkpoint.gguf.gguf_types import GROUPED_TYPES
from workers.quant.forms import Form, GroupedForm

# What the products compute with: a smaller group is padded with weights of zero, see tensor.py.
SMALLEST_GROUP = 32
_FORMS = {
    name: GroupedForm(**asdict(kind))
    if kind.group_size >= SMALLEST_GROUP
    else replace(GroupedForm(**asdict(kind)), group_size=SMALLEST_GROUP, reordered=True)
    for name, kind in GROUPED_TYPES.items()
}


def form_of(dtype: str) -> Form:
    """None: plain floats."""
    return _FORMS.get(dtype)
