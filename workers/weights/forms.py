"""The form of every matrix of a checkpoint, from its configuration and headers. Reads no weights.

Knows which reader a kind of checkpoint has; each reader knows its tensors.
"""

from pathlib import Path

from workers.config import ModelConfig
from workers.quant.forms import Form
from workers.weights.files import weight_files
from workers.weights.header import TensorInfo, read_header
from workers.weights.names import expected_shapes, name_in_model
from workers.weights.quantized.header import NamedHeader
from workers.weights.quantized.matrices import check_matrices, find_matrices


def read_forms(folder: str | Path, config: ModelConfig) -> dict[str, Form]:
    """{Hugging Face's name of a tensor: its form}; a name that is not there is dense. A tied head has the form of the embedding.

    Raises CheckpointError for headers that do not fit the configuration.
    """
    if config.layout == "gguf":
        from workers.weights.gguf.open import read_gguf_forms  # late: the package that reads such files imports a lot

        return read_gguf_forms(folder)
    if config.stored is None:
        return {}
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(Path(folder), config.layout):
        tensors |= read_header(file)[1]
    named = {
        known_as: NamedHeader.of(name, tensor)
        for name, tensor in tensors.items()
        if (known_as := name_in_model(name, config.layout)) is not None
    }
    return check_matrices(find_matrices(named)[1], config.stored, expected_shapes(config))
