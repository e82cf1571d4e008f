"""Runs `serve` as the hosting platform wants it: its port, its paths and its model, where the command itself says nothing.

Knows how what a platform wants becomes options (cluster/config/platform.py knows the platforms). An option that is given wins.
"""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence

from cluster.cli.options.parser import parse
from cluster.config.platform import Platform, recognize
from cluster.system.files import has_files
from workers.errors import ConfigError


def parse_here(argv: Sequence[str], *, environ: Mapping[str, str] = os.environ) -> Namespace:
    """The arguments of a command on this platform. Raises ConfigError if the platform brought no model."""
    args = parse(argv, environ=environ)
    if args.run.name != "serve":
        return args
    platform = recognize(environ, asked=args.platform or "auto", has_files=has_files)
    if platform is None:
        return args
    command, *given = argv
    model = [] if args.model is not None or args.config is not None else [_model(platform)]
    return parse([command, *platform.arguments, *given, *model], environ=environ)


def _model(platform: Platform) -> str:
    if platform.model is None:
        raise ConfigError(
            f"{platform.title} was recognized ({platform.evidence}), but it brought no model.",
            remedy="Name one in the command or in HF_MODEL_ID, or set TRAMONTANE_PLATFORM=none.",
            param="MODEL",
        )
    return platform.model
