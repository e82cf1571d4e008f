"""Whether the tensors in a checkpoint's headers are exactly those of the model that its configuration describes.

Compares names, shapes and types before any weight is loaded. Knows no format of files; the loader proves the same while it loads.
"""

from collections.abc import Mapping
from pathlib import Path

from workers.checkpoint.gguf.gguf_file import GgufTensor
from workers.checkpoint.gguf.gguf_types import is_supported
from workers.errors import CheckpointError
from workers.model_numbers import Layout, ModelConfig
from workers.weights.files import INDEXES, read_index
from workers.weights.header import DOWNLOAD_AGAIN, FLOAT_BYTES, TensorInfo
from workers.weights.names import EMBEDDING, HEAD, expected_shapes, name_in_model
from workers.weights.quantized.header import NamedHeader

QUANTIZED = (".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".quant_state")
_CHUNK_BYTES = 1 << 22


def check_index(folder: Path, layout: Layout, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError for a tensor that the index lists in a file that does not have it."""
    listed = read_index(folder, layout) or {}
    missing = [
        name for name, file in listed.items() if name not in tensors or tensors[name].path.name != Path(file).name
    ]
    if missing:
        name, more = missing[0], f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{INDEXES[layout]} lists the tensor {name!r}{more} in {listed[name]}, which does not have it.",
            remedy=f"The files come from different downloads or revisions. {DOWNLOAD_AGAIN}",
        )


def check_tensors(folder: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo | GgufTensor]) -> None:
    """Raises CheckpointError for a missing, unknown, quantized or misshapen tensor, and for a tied head that differs."""
    quantized = next((name for name in tensors if name.endswith(QUANTIZED)), None)
    if quantized is not None and config.stored is None:
        raise CheckpointError(
            f"{tensors[quantized].path} has quantized weights ({quantized}), but config.json has no quantization_config that says how.",
            remedy="Use the configuration file that belongs to the weights.",
        )
    found = {
        known_as: tensor
        for name, tensor in tensors.items()
        if (known_as := name_in_model(name, config.layout)) is not None
    }
    expected = expected_shapes(config)
    if config.stored is not None and config.layout != "gguf":
        # Late: it imports torch, a second of the start of a server and 100 MB of its memory, for quantized weights alone.
        from workers.weights.quantized.matrices import check_matrices, find_matrices

        headers = {
            name: NamedHeader.of(name, tensor) for name, tensor in found.items() if isinstance(tensor, TensorInfo)
        }
        plain, modules = find_matrices(headers)
        forms = check_matrices(modules, config.stored, expected)
        found = {name: header.info for name, header in plain.items()}
        expected = {name: shape for name, shape in expected.items() if name not in forms}
    if missing := [name for name in expected if name not in found]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder} lacks the tensor {missing[0]}{more}.", remedy=f"A weight file is missing. {DOWNLOAD_AGAIN}"
        )
    for name, tensor in found.items():
        shape = expected.get(name)
        if shape is None:
            if name == HEAD and config.tie_word_embeddings:
                _check_tied_head(tensor, found[EMBEDDING])
                continue
            raise CheckpointError(
                f"The tensor {name} in {tensor.path} has no place in a {config.num_hidden_layers}-layer model of this kind.",
                remedy="Use a checkpoint of a plain Mistral or Llama model.",
            )
        if not (is_supported(tensor.dtype) if config.layout == "gguf" else tensor.dtype in FLOAT_BYTES):
            raise CheckpointError(
                f"The tensor {name} in {tensor.path} is of type {tensor.dtype}, which is not supported.",
                remedy="Use the float32, float16 or bfloat16 weights.",
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"The tensor {name} in {tensor.path} has shape {list(tensor.shape)}, but the model's configuration asks for "
                f"{list(shape)}.",
                remedy="Use the configuration file that belongs to the weights.",
            )


def _check_tied_head(head: TensorInfo | GgufTensor, embedding: TensorInfo | GgufTensor) -> None:
    """Some conversions repeat the embedding as the head. transformers 5 keeps a head that differs, transformers 4 drops it."""
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same:
        with head.path.open("rb") as a, embedding.path.open("rb") as b:
            a.seek(head.start)
            b.seek(embedding.start)
            left = head.end - head.start
            while same and left > 0:
                num_bytes = min(left, _CHUNK_BYTES)
                same = a.read(num_bytes) == b.read(num_bytes)
                left -= num_bytes
    if not same:
        raise CheckpointError(
            f"The tensor {HEAD} in {head.path} differs from the embedding, but config.json says that they are tied.",
            remedy="Set tie_word_embeddings to false in config.json.",
        )
