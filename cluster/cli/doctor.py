"""`tramontane doctor`: its options, and what a script is told.

0 no problem was found; there may be warnings
1 at least one problem, or with --strict at least one warning
2 an option cannot work, so that nothing was examined
"""

import argparse
import os

from cluster.config.serve import DEFAULT_DEPLOYMENT
from cluster.doctor.examine import Order, examine
from cluster.doctor.findings import Severity, count
from cluster.doctor.report import render, summary, to_json
from cluster.system.log import LOG_LEVELS
from cluster.terminal.phases import Console
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError, TramontaneError

PLAIN_WIDTH = 140  # sentences are read more easily in shorter lines
ABOUT = (
    "Examines this machine, or all nodes of a Ray cluster: driver, GPUs, versions, network, memory, disks and model files, and an "
    "all-reduce between real ranks where replicas would run. Takes nothing that a running deployment holds. "
    "Exits with 0 if there is no problem, else with 1."
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `doctor`, which sets `run`."""
    parser = commands.add_parser(
        "doctor", help="find out what would keep this machine or cluster from serving", description=ABOUT
    )
    parser.set_defaults(run=doctor)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: the demo model)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        default=os.environ.get("RAY_ADDRESS"),
        help="examine the nodes of this Ray cluster (default: RAY_ADDRESS, else this machine alone)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        metavar="N",
        help="ranks of a replica, placed as `serve` would (default: a rank on every GPU or, without GPUs, on every node)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: no GPU is a problem")
    parser.add_argument("--host", default="127.0.0.1", help="address that the endpoint shall have (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port that the endpoint shall have (default: 8000)")
    parser.add_argument(
        "--name",
        default=DEFAULT_DEPLOYMENT,
        help="the deployment's name, which its data directory has too (default: %(default)s)",
    )
    parser.add_argument(
        "--no-all-reduce",
        action="store_true",
        help="start no ranks, and without --ray-address no Ray: a second instead of ten",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds ranks get to meet, and for each of their collectives (default: 30)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    parser.add_argument("--json", action="store_true", help="print findings and the facts behind them as JSON")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")


def doctor(args: argparse.Namespace) -> None:
    """Prints what was found. Raises ConfigError for an option that cannot work, TramontaneError when something is wrong."""
    size = args.tensor_parallel_size
    if size is not None and size < 1:
        raise ConfigError(f"--tensor-parallel-size {size} is no number of ranks; use at least 1.")
    if not 1 <= args.port <= 65_535:
        raise ConfigError(f"--port {args.port} is not a port; use 1 to 65535.")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(f"--timeout {args.timeout:g} is no time to wait; use a number of seconds above 0.")
    order = Order(
        model=args.model,
        revision=args.revision,
        ray_address=args.ray_address,
        tensor_parallel_size=size,
        device=args.device,
        host=args.host,
        port=args.port,
        deployment=args.name,
        tries_ranks=not args.no_all_reduce,
        timeout_s=args.timeout,
    )
    found = examine(order, Console())
    if args.json:
        print(to_json(found.findings, nodes=found.nodes, all_reduce=found.all_reduce))
    else:
        answer_console(plain_width=PLAIN_WIDTH).print(render(found.findings))
    bad = count(found.findings, Severity.PROBLEM)
    if bad or (args.strict and count(found.findings, Severity.WARNING)):
        raise TramontaneError(f"This is not fit to serve: {summary(found.findings)}")
