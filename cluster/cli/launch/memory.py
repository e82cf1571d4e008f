"""Whether the ranks that a command starts on this machine have the memory for the model, said before anything is loaded."""

from workers.config import EngineConfig
from workers.device.fit import check_fits
from workers.device.memory import Memory
from workers.errors import ConfigError

HERE = "this machine"


def check_memory(config: EngineConfig, *, num_started: int, num_replicas: int, memory: Memory | None) -> str | None:
    """A warning if full KV caches, or the replicas that the load may add, do not fit; None if all fits, on CUDA, and if the memory is not
    known. Raises ConfigError if the weights do not fit.

    num_started: replicas that start at once, of up to `num_replicas`. memory: of this machine.
    """
    if config.device != "cpu" or memory is None:
        return None
    size = config.tensor_parallel_size
    warning = check_fits(config, num_ranks=num_started * size, memory=memory, where=HERE)
    if warning is not None or num_replicas == num_started:
        return warning
    try:
        return check_fits(config, num_ranks=num_replicas * size, memory=memory, where=HERE)
    except ConfigError as e:
        return f"{num_replicas} replicas do not fit. {e.message} Use fewer with --replicas."
