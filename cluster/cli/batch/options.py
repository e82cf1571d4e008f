"""The options of `tramontane batch`, by what they say: which answers are wanted, and where they are computed. Knows no command."""

import argparse
from argparse import SUPPRESS
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.batch.records import ENDPOINTS, parse_window
from cluster.cli.batch.convert import FORMATS
from cluster.cli.batch.parts.records import Part, parse_part
from cluster.cli.options import parse_replicas
from cluster.config.serve import API_KEY_ENV
from workers.errors import RequestError

AddOptions = Callable[[argparse.ArgumentParser], None]


def add_request_options(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_argument_group("what is asked", "of lines that do not say it themselves")
    asked.add_argument(
        "--model", metavar="MODEL", help="folder or Hub id (default: the demo model); with --url its served name"
    )
    asked.add_argument("--revision", help="branch, tag or commit on the Hub")
    asked.add_argument("--served-model-name", metavar="NAME", help="the model's name in the lines (default: MODEL)")
    asked.add_argument("--chat-template", default="auto", metavar="NAME", help="as for `serve`")
    asked.add_argument("--format", choices=FORMATS, help="of IN (default: as its name ends)")
    asked.add_argument("--endpoint", choices=ENDPOINTS, help="default: as the lines' fields suggest")
    asked.add_argument(
        "--column",
        action="append",
        dest="columns",
        metavar="FIELD=NAME",
        help="prompt=, messages= or input= and a column's name, or a text with columns in it: 'prompt=Translate: {text}'; "
        "custom_id=NAME names the lines; may be repeated",
    )
    asked.add_argument("--max-tokens", type=int, metavar="N")
    asked.add_argument("--temperature", type=float, metavar="T")
    asked.add_argument("--top-p", type=float, metavar="P")
    asked.add_argument("--seed", type=int, metavar="N", help="default: one of each line's own")
    asked.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        help="any other field, in JSON: --set top_k=40; may be repeated",
    )


def add_part_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="answer every N-th line only, from the I-th on (I from 0), into a part of OUT; `batch merge OUT` joins the parts",
    )


def add_server_options(parser: argparse.ArgumentParser) -> Any:
    server = parser.add_argument_group("server")
    server.add_argument("--url", metavar="URL", help="a running server, which then answers the lines")
    server.add_argument("--api-key", help=f"the server's key; better given as {API_KEY_ENV}")
    server.add_argument(
        "--ca-cert", type=Path, metavar="FILE", help="certificate to trust, where https uses one of your own"
    )
    return server


def add_place_options(
    parser: argparse.ArgumentParser, add_engine_options: AddOptions, *, is_resume: bool = False
) -> None:
    add_server_options(parser)
    before = {action.dest for action in parser._actions}
    cluster = parser.add_argument_group("cluster", "without --url")
    cluster.add_argument("--ray-address", metavar="ADDRESS", help="Ray cluster to join (default: start one here)")
    cluster.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN:MAX",
        help="copies of the model (default: 1; in a Ray that is joined 0:1, or 0: and --max-replicas)",
    )
    cluster.add_argument("--max-replicas", type=positive, metavar="N", help="most copies that the batch may have")
    cluster.add_argument("--tensor-parallel-size", "-tp", type=positive, default=1, metavar="N", help="ranks of each")
    if not is_resume:
        cluster.add_argument(
            "--deadline",
            type=_window,
            metavar="TIME",
            help="such as 2h: replicas are added to keep it, and lines not answered by then are given up "
            "(default: none; on a server 24h)",
        )
    add_engine_options(parser)
    if is_resume:  # what is not given again is as it was
        for action in parser._actions:
            if action.dest not in before:
                action.default = SUPPRESS


def _window(text: str) -> str:
    try:
        parse_window(text)
    except RequestError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number and a unit, s, m, h or d, such as 2h") from e
    return text


def _part(text: str) -> Part:
    try:
        return parse_part(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _replicas(text: str) -> tuple[int, int]:
    try:
        return parse_replicas(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
