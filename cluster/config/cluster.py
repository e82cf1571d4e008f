"""The settings of a whole server: one ServeConfig for each of its models. Knows what several models must not have in common.

The options of `serve` make a server of one model; the file of `serve --config` may name several.
"""

from dataclasses import dataclass

from cluster.config.serve import ServeConfig
from cluster.protocol.names import member_of
from workers.errors import ConfigError


@dataclass(frozen=True)
class ClusterConfig:
    """`deployments`: at least one. What is about the server, such as its port and its keys, is the same in all of them."""

    deployments: tuple[ServeConfig, ...]

    def __post_init__(self) -> None:
        assert self.deployments, "a server has at least one model"
        if len(self.deployments) == 1:
            return
        taken: dict[str, str] = {}  # name in requests -> what has it
        for config in self.deployments:
            own = member_of(config.deployment)
            assert own is not None, "each of several deployments has a name"
            for name, what in ((config.model_name, f"the model of {own!r}"), *_adapters(config, own)):
                if name in taken:
                    raise ConfigError(
                        f"{what[0].upper()}{what[1:]} and {taken[name]} have the same name in requests: {name!r}.",
                        remedy="Give one of them another: served-model-name for a model, the first part of lora for an adapter.",
                        param="--served-model-name",
                    )
                taken[name] = what
        names = [config.deployment for config in self.deployments]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"Two deployments are named {member_of(name)!r}.",
                    remedy="Give one of them another name.",
                    param="name",
                )

    @property
    def server(self) -> ServeConfig:
        """For what is about the server."""
        return self.deployments[0]

    @property
    def claim(self) -> str:
        """What a data directory is claimed for: the names of the models."""
        return ", ".join(config.model_name for config in self.deployments)

    @property
    def num_ranks(self) -> int:
        """The most that may run at once."""
        return sum(config.engine.tensor_parallel_size * config.max_replicas for config in self.deployments)


def _adapters(config: ServeConfig, own: str) -> list[tuple[str, str]]:
    return [(name, f"the adapter {name!r} of {own!r}") for name, _ in config.lora]
