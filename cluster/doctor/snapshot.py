"""What one node reports about itself: its machine and, if a folder is given, the checkpoint there.

Runs on every node. The result travels as JSON, which nodes with another version of Tramontane can still read.
"""

from collections.abc import Mapping

import msgspec

from cluster.doctor.facts import Machine, Model
from cluster.doctor.machine import read_machine
from cluster.doctor.model_files import read_model


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """`model` is None if no checkpoint folder was given."""

    machine: Machine
    model: Model | None = None


def take_snapshot(disks: Mapping[str, str], model_folder: str | None) -> bytes:
    """A Snapshot as JSON. disks: what each path is used for, such as {"/tmp/ray": "Ray's files"}."""
    model = None if model_folder is None else read_model(model_folder)
    return msgspec.json.encode(Snapshot(machine=read_machine(disks), model=model))


def parse_snapshot(encoded: bytes) -> Snapshot:
    """Unknown fields are ignored. Raises msgspec.ValidationError."""
    return msgspec.json.decode(encoded, type=Snapshot)
