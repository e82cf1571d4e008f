"""The file of --profile: whether it can be written, checked before anything starts, and how it is written at the end."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.profile.merge import Part, merge
from cluster.system.files import replace_file
from workers.errors import ConfigError

DEFAULT_NUM_STEPS = 50
MAX_NUM_STEPS = 500
HOW_TO_OPEN = "Open it at https://ui.perfetto.dev."


@dataclass(frozen=True, kw_only=True)
class ProfileFile:
    """`path`: where; compressed with gzip if its name ends with .gz. `num_steps`: how many engine steps it is for.

    Raises ConfigError for a file that cannot be written.
    """

    path: Path
    num_steps: int = DEFAULT_NUM_STEPS

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_NUM_STEPS:
            raise ConfigError(
                f"--profile-steps {self.num_steps} is out of range.",
                remedy=f"Use 1 to {MAX_NUM_STEPS}.",
                param="--profile-steps",
            )
        if reason := self._obstacle():
            raise ConfigError(
                f"--profile {self.path} cannot be written: {reason}.",
                remedy="Name a file in a folder where you may create files.",
                param="--profile",
            )

    def write(self, parts: Sequence[Part]) -> str:
        """Replaces the file as a whole. Returns what to tell the user, also if it failed."""
        data = merge(parts, compress=self.path.suffix == ".gz")
        try:
            replace_file(self.path, data)
        except OSError as e:
            return f"The profile could not be written to {self.path}: {e.strerror or e}."
        num_steps = max((part.recording.num_steps for part in parts), default=0)
        left_out = sum(part.recording.num_left_out for part in parts)
        more = f" {left_out:,} later events did not fit." if left_out else ""
        return (
            f"The profile of {num_steps} step{'s' * (num_steps != 1)} is in {self.path} ({len(data) / 2**20:.1f} MiB)."
            f"{more} {HOW_TO_OPEN}"
        )

    def _obstacle(self) -> str | None:
        if self.path.is_dir():
            return "it is a folder"
        try:
            with tempfile.TemporaryFile(dir=self.path.parent):
                return None
        except OSError as e:
            return (e.strerror or str(e)).lower()
