"""The models that `serve` was asked for, one or those of a file, and everything about them that can be wrong before Ray starts.

Knows checkpoints, adapters and text; no Ray and no gateway.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.cli.adapters.start import check_adapters
from cluster.cli.launch.device import Choice, RequestedDevice, before_ray
from cluster.cli.options.cluster_file import ClusterFile, read_cluster_file
from cluster.cli.options.settings import serve_config
from cluster.config.checkpoint_check import check_checkpoint
from cluster.config.checkpoint_location import resolve_model
from cluster.config.cluster import ClusterConfig
from cluster.config.dtype import Cpus, this_machine
from cluster.config.engine import Device
from cluster.config.serve import ServeConfig
from cluster.protocol.names import member_of
from cluster.text.load import LoadedText, load_text
from workers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model to serve. `name`: what it is served under without --served-model-name. `file`, `index`: where it is named, if in a file.

    `device`: as `before_ray` chose.
    """

    args: Namespace
    folder: Path
    name: str
    device: Choice
    file: ClusterFile | None = None
    index: int = 0

    @property
    def requested(self) -> RequestedDevice:
        requested: RequestedDevice = self.args.device
        return requested

    def configure(self, device: Device, cpus: Cpus = this_machine) -> ServeConfig:
        """Raises ConfigError."""
        with _blamed(self.file, self.index):
            return serve_config(self.args, self.folder, self.name, device=device, cpus=cpus)

    def check(self, config: ServeConfig) -> None:
        """Raises ConfigError and CheckpointError for what no replica could load."""
        with _blamed(self.file, self.index):
            check_checkpoint(self.folder, chat_template=config.chat_template)
            check_adapters(config)

    def text(self, config: ServeConfig) -> LoadedText:
        with _blamed(self.file, self.index):
            vocab_size = config.engine.model.vocab_size
            return load_text(self.folder, chat_template=config.chat_template, model_vocab_size=vocab_size)


def models_of(args: Namespace) -> list[Model]:
    """One, or those of the file of --config. Downloads what is on the Hub. Raises ConfigError."""
    if member_of(args.name) is not None:
        raise ConfigError(
            f"--name {args.name!r} is not a valid name.",
            remedy="Use at most 42 lower-case letters, digits and hyphens.",
            param="--name",
        )
    file = None if args.config is None else read_cluster_file(args.config)
    found = []
    for i, own in enumerate([args] if file is None else file.arguments(args)):
        with _blamed(file, i):
            folder, name = resolve_model(own.model, revision=own.revision, gguf_file=own.gguf_file)
            device = before_ray(own.device, ray_address=own.ray_address, num_gpus=own.tensor_parallel_size)
        found.append(Model(args=own, folder=folder, name=name, device=device, file=file, index=i))
    return found


def cluster_config(models: Sequence[Model], configs: Sequence[ServeConfig]) -> ClusterConfig:
    """Raises ConfigError for what several models cannot have in common."""
    try:
        return ClusterConfig(tuple(configs))
    except ConfigError as e:
        file = models[0].file
        raise e if file is None else ConfigError(f"{file.path}: {e.message}", remedy=e.remedy, param=e.param) from e


@contextlib.contextmanager
def _blamed(file: ClusterFile | None, index: int) -> Iterator[None]:
    """Errors name the place in the file."""
    try:
        yield
    except ConfigError as e:
        if file is None:
            raise
        raise file.blame(index, e) from e
