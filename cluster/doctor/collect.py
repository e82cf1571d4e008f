"""What runs on each node, as one look: the machine and, if asked for, the checkpoint. Its answer is JSON, which any version can read."""

from collections.abc import Mapping

import msgspec

from cluster.doctor.facts import Machine, Model
from cluster.doctor.machine import read_machine
from cluster.doctor.model_files import read_model


class Look(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    model: Model | None = None


def look(disks: Mapping[str, str], model_folder: str | None) -> bytes:
    """disks: what for, by path."""
    model = None if model_folder is None else read_model(model_folder)
    return msgspec.json.encode(Look(machine=read_machine(disks), model=model))
