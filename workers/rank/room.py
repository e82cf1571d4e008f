"""Whether the host of a starting rank has the memory for the weights that its ranks are about to load: what only the host itself knows."""

from dataclasses import replace

from workers.config import EngineConfig
from workers.device.fit import check_fits, need_of
from workers.device.memory import Memory
from workers.errors import ConfigError, ReplicaUnavailableError
from workers.native.bfloat16 import keeps_narrow_weights


def check_room(config: EngineConfig, *, num_ranks: int, memory: Memory | None, host: str) -> None:
    """num_ranks: of this replica, on this host. memory: the host's; None is not checked.

    Raises ConfigError for weights that could never be there, and ReplicaUnavailableError for those that do not fit now: what takes the
    memory may be a replica that is just ending, so the start is tried again.
    """
    if config.device != "cpu" or memory is None:
        return
    if config.narrow_weights and not keeps_narrow_weights():
        config = replace(config, narrow_weights=False)
    try:
        check_fits(config, num_ranks=num_ranks, memory=memory, where=f"node {host}", has_started=True)
    except ConfigError as e:
        if num_ranks * need_of(config, has_started=True).loaded_bytes > memory.total_bytes:
            raise
        raise ReplicaUnavailableError(e.message, remedy=e.remedy) from e
