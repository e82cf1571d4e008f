"""The rows of --profile, which `tramontane serve` and `tramontane generate` share, and what they come to."""

from argparse import Namespace
from pathlib import Path

from cluster.cli.options.option import Group, option
from cluster.profile.file import DEFAULT_NUM_STEPS, MAX_NUM_STEPS, ProfileFile
from workers.errors import ConfigError

PROFILE = Group(
    "profile",
    (
        option(
            "--profile",
            parse=Path,
            metavar="FILE",
            help="record engine steps on every rank and the work of the gateway from the first request on, and write them to FILE as a "
            "Chrome trace, for https://ui.perfetto.dev; compressed if FILE ends with .gz",
        ),
        option(
            "--profile-steps",
            parse=int,
            metavar="N",
            help=f"with --profile, how many steps to record: 1 to {MAX_NUM_STEPS}; fewer if requests pause for some seconds",
            shown_default=str(DEFAULT_NUM_STEPS),
        ),
    ),
)


def profile_file(args: Namespace) -> ProfileFile | None:
    """None without --profile. Raises ConfigError."""
    if args.profile is None:
        if args.profile_steps is not None:
            raise ConfigError(
                "--profile-steps has no effect without --profile.",
                remedy="Add --profile FILE.",
                param="--profile-steps",
            )
        return None
    num_steps = DEFAULT_NUM_STEPS if args.profile_steps is None else args.profile_steps
    return ProfileFile(path=args.profile.expanduser().absolute(), num_steps=num_steps)
