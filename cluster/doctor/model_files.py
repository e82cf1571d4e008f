"""A checkpoint folder, or a GGUF file, on this machine as facts for the doctor.

cluster/config/checkpoint_check.py knows what is checked.
"""

from pathlib import Path

from cluster.config.checkpoint_check import REMEDY, examine_checkpoint
from cluster.config.dtype import keeps_more_in_float32, keeps_narrow, stored_dtype
from cluster.doctor.facts import Fault, Model
from workers.checkpoint.gguf.gguf_file import SUFFIX
from workers.config import DTYPE_BYTES, Dtype, EngineConfig, ModelConfig
from workers.device.fit import need_of


def read_model(folder: str) -> Model:
    """Reads the folder on this machine. Never raises for what is wrong with it: that is in `faults`."""
    path = Path(folder)
    if not path.exists():
        what = "GGUF file" if path.suffix == SUFFIX else "model folder"
        fault = Fault(
            message=f"The {what} {folder} does not exist on this node.",
            remedy="Copy the files to the same path on every node that runs ranks, or put them on a shared disk.",
        )
        return Model(folder=folder, faults=(fault,))
    found = examine_checkpoint(path)
    faults = tuple(Fault(message=e.message, remedy=e.remedy or REMEDY) for e in found.faults)
    if found.config is None:
        return Model(folder=folder, faults=faults)
    return Model(
        folder=folder,
        num_files=found.num_files,
        num_bytes=found.num_bytes,
        bytes_per_weight=DTYPE_BYTES[found.config.dtype],
        kept_bytes=_kept_bytes(folder, found.config),
        dtype=found.config.dtype,
        fingerprint=found.fingerprint,
        left_out=found.left_out,
        faults=faults,
    )


def _kept_bytes(folder: str, config: ModelConfig) -> dict[str, int]:
    """In each dtype that --dtype auto may choose."""
    if config.stored is None:
        stored = stored_dtype(Path(folder), config)
        if not keeps_narrow("float32", device="cpu", stored=stored, model=config):
            return {}
        return {
            "float32": _weight_bytes(folder, config, dtype="float32", narrow_weights=True),
            "bfloat16": _weight_bytes(folder, config, dtype="bfloat16"),
        }
    dtypes: set[Dtype] = {"float32"} if keeps_more_in_float32(config) else {"float32", config.dtype}
    return {dtype: _weight_bytes(folder, config, dtype=dtype) for dtype in dtypes}


def _weight_bytes(folder: str, config: ModelConfig, *, dtype: Dtype, narrow_weights: bool = False) -> int:
    engine = EngineConfig(model_path=folder, model=config, dtype=dtype, narrow_weights=narrow_weights)
    return need_of(engine).weight_bytes
