"""The command `tramontane`: its options, and how errors reach the user: one sentence on stderr and an exit code.

0 done, or stopped by Ctrl-C or SIGTERM    1 something failed    2 an option cannot work
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cluster.cli.batch.main import add_parser as add_batch_parser
from cluster.cli.doctor import add_parser as add_doctor_parser
from cluster.cli.keys import add_parser as add_keys_parser
from cluster.cli.options import parse_bytes, parse_replicas
from cluster.cli.plan import add_parser as add_plan_parser
from cluster.config.serve import (
    API_KEY_ENV,
    BATCH_STORE_ENV,
    CHAT_TEMPLATES,
    DEFAULT_DEPLOYMENT,
    METRICS_PREFIXES,
    ROUTING_POLICIES,
)
from cluster.keys.file import API_KEYS_ENV
from cluster.protocol.notice import PREEMPTION_NOTICES
from cluster.system.log import LOG_FORMATS, LOG_LEVELS, setup_logging
from workers.errors import ConfigError, TramontaneError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are values; those that depend on something are in the option's own text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = make_parser().parse_args(argv)
    if getattr(args, "api_key", "") is None:
        args.api_key = os.environ.get(API_KEY_ENV) or None
    if getattr(args, "batch_store", "") is None and not args.no_batches:
        args.batch_store = os.environ.get(BATCH_STORE_ENV) or None
    if getattr(args, "api_keys", "") is None and os.environ.get(API_KEYS_ENV):
        args.api_keys = Path(os.environ[API_KEYS_ENV])
    setup_logging(
        args.log_level, format=getattr(args, "log_format", "text"), prompts=getattr(args, "log_prompts", False)
    )
    try:
        args.run(args)
    except TramontaneError as e:
        if args.log_level == "debug":
            logging.getLogger(__name__).exception("failed")
        print(f"tramontane: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tramontane", description="Serves Mistral-family models on a Ray cluster.")
    parser.add_argument("--version", action="version", version=f"tramontane {version('tramontane')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="start an OpenAI-compatible endpoint",
        formatter_class=HelpFormatter,
        description="Starts Ray (or joins one), the model's ranks and an OpenAI-compatible HTTP endpoint.",
    )
    serve.set_defaults(run=_serve)
    _add_model_options(serve)
    http = serve.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on; one that others can reach needs a key")
    http.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    http.add_argument(
        "--api-key",
        help=f"key clients must send; better given as {API_KEY_ENV}, which does not show in the process list",
    )
    _add_security_options(http)
    http.add_argument("--no-embeddings", action="store_true", help="refuse /v1/embeddings")
    http.add_argument("--served-model-name", metavar="NAME", help="name clients use (default: MODEL)")
    http.add_argument(
        "--chat-template",
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(CHAT_TEMPLATES)}, or the path of a .jinja file; jinja: the checkpoint's own",
    )
    http.add_argument(
        "--gateways", type=_positive, default=1, metavar="N", help="HTTP servers, this one included; on other nodes too"
    )
    _add_batch_options(serve)
    _add_cluster_options(serve)
    _add_routing_options(serve)
    watching = serve.add_argument_group("monitoring")
    watching.add_argument(
        "--metrics-prefix", choices=METRICS_PREFIXES, default="tramontane", help="vllm: for dashboards made for vLLM"
    )
    watching.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="json: one object a line")
    watching.add_argument("--log-prompts", action="store_true", help="write prompts into the log, at level info")
    _add_engine_options(serve)

    status = commands.add_parser(
        "status",
        help="show replicas, ranks, KV use and throughput of a running server",
        formatter_class=HelpFormatter,
        description="Shows replicas, ranks, nodes, KV use and throughput of a running server, as a live table.",
    )
    status.set_defaults(run=_status)
    _add_url_options(status)
    status.add_argument("--watch", type=float, default=1.0, metavar="S", help="seconds between two looks")
    status.add_argument("--once", action="store_true", help="look once, as is done where the output is no terminal")
    status.add_argument("--json", action="store_true", help="print what is known as JSON")

    drain = commands.add_parser(
        "drain",
        help="take a replica out of service without losing a stream",
        formatter_class=HelpFormatter,
        description="Sends a replica nothing new, lets its streams finish or move, then ends it; another takes its place.",
    )
    drain.set_defaults(run=_drain)
    drain.add_argument("replica", metavar="REPLICA", help="its name, such as r0 (see `tramontane status`)")
    drain.add_argument("--grace", type=float, metavar="S", help="seconds streams get to finish before they move")
    _add_url_options(drain)

    down = commands.add_parser(
        "down",
        help="end every replica of a deployment on a Ray cluster",
        formatter_class=HelpFormatter,
        description="Ends every replica, gateway and the controller of a deployment; Ray itself goes on.",
    )
    down.set_defaults(run=_down)
    down.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        required="RAY_ADDRESS" not in os.environ,
        default=os.environ.get("RAY_ADDRESS"),
        help="the Ray cluster (default: RAY_ADDRESS)",
    )
    _add_name_option(down)
    down.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")

    add_batch_parser(commands, add_engine_options=_add_engine_options)
    add_keys_parser(commands)
    add_doctor_parser(commands)
    add_plan_parser(commands)

    generate = commands.add_parser(
        "generate",
        help="complete one prompt in this process",
        formatter_class=HelpFormatter,
        description="Completes one prompt in this process, without Ray and without HTTP.",
    )
    generate.set_defaults(run=_generate, tensor_parallel_size=1)
    _add_model_options(generate)
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--prompt", default="def fibonacci(n):", help="text to continue")
    sampling.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most likely token")
    sampling.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total")
    sampling.add_argument("--seed", type=int, help="the same seed gives the same text (default: a random one)")
    _add_engine_options(generate)
    return parser


def _add_security_options(http: "argparse._ArgumentGroup") -> None:
    http.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help=f"keys with limits, made by `tramontane keys create`; read again when it changes (default: {API_KEYS_ENV})",
    )
    http.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain in PEM format, for https")
    http.add_argument(
        "--tls-key", type=Path, metavar="FILE", help="its private key; both are read again when they change"
    )
    http.add_argument(
        "--cors-origin", action="append", metavar="ORIGIN", help="web pages that may use it; may be repeated"
    )


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where files and batches are kept (default: tramontane/NAME in XDG_DATA_HOME or ~/.local/share)",
    )
    batches.add_argument(
        "--batch-store",
        metavar="URL",
        help="PostgreSQL database for the batches of gateways on several hosts, postgresql://...; better given as "
        f"{BATCH_STORE_ENV}, which does not show in the process list",
    )
    batches.add_argument("--no-batches", action="store_true", help="refuse /v1/files and /v1/batches")


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--replicas",
        type=_replicas,
        default="1",
        metavar="N|MIN:MAX",
        help="copies of the model; with MIN:MAX the load decides, and MIN may be 0",
    )
    cluster.add_argument(
        "--tensor-parallel-size", "-tp", type=int, default=1, metavar="N", help="ranks of each replica"
    )
    cluster.add_argument("--ray-address", metavar="ADDRESS", help="Ray cluster to join (default: start one here)")
    _add_name_option(cluster)
    cluster.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds running requests get at shutdown and drain",
    )
    cluster.add_argument(
        "--preemption-notices",
        choices=PREEMPTION_NOTICES,
        default="auto",
        help="whose notices that a machine goes away are heeded; auto: those of the cloud the machine is in",
    )
    cluster.add_argument(
        "--scale-down-after", type=float, default=600.0, metavar="S", help="how long a replica must have been needless"
    )
    cluster.add_argument(
        "--ttft-objective", type=float, default=2.0, metavar="S", help="time to first token that scaling aims at"
    )


def _add_routing_options(parser: argparse.ArgumentParser) -> None:
    routing = parser.add_argument_group("routing")
    routing.add_argument(
        "--routing-policy", choices=ROUTING_POLICIES, default="prefix", help="how a replica is chosen for a request"
    )
    routing.add_argument(
        "--max-queued-tokens",
        type=_positive,
        default=2_000_000,
        metavar="N",
        help="prompt tokens that may wait for a replica; beyond, requests get 429",
    )
    routing.add_argument(
        "--queue-timeout", type=float, default=300.0, metavar="S", help="longest wait for a replica before a 503"
    )


def _add_name_option(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--name", default=DEFAULT_DEPLOYMENT, help="the deployment's name in Ray; several may share a cluster"
    )


def _add_url_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where a gateway listens")
    parser.add_argument(
        "--ca-cert", type=Path, metavar="FILE", help="certificate to trust, where https uses one of your own"
    )
    parser.add_argument("--api-key", help=f"the server's key; better given as {API_KEY_ENV}")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: the demo model)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    engine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 on the CPU, the checkpoint's own on CUDA",
    )
    engine.add_argument(
        "--max-model-len", type=_positive, metavar="N", help="most tokens of prompt and output together"
    )
    engine.add_argument(
        "--max-num-seqs", type=_positive, metavar="N", help="most sequences computed at once (default: 64)"
    )
    engine.add_argument(
        "--max-num-batched-tokens", type=_positive, metavar="N", help="most tokens of one step (default: 1024)"
    )
    engine.add_argument("--block-size", type=_positive, metavar="N", help="tokens per KV block (default: 16, CUDA 256)")
    engine.add_argument("--num-kv-blocks", type=_positive, metavar="N", help="KV blocks per rank, instead of an amount")
    engine.add_argument("--kv-cache-memory", type=_bytes, metavar="SIZE", help="per rank on the CPU (default: 1GiB)")
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="share of a GPU's memory to use"
    )
    engine.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt in full")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _replicas(text: str) -> tuple[int, int]:
    try:
        return parse_replicas(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _serve(args: argparse.Namespace) -> None:
    from cluster.cli.serve import serve

    serve(args)


def _status(args: argparse.Namespace) -> None:
    from cluster.cli.status import status

    status(args)


def _drain(args: argparse.Namespace) -> None:
    from cluster.cli.operate import drain

    drain(args)


def _down(args: argparse.Namespace) -> None:
    from cluster.cli.operate import down

    down(args)


def _generate(args: argparse.Namespace) -> None:
    from cluster.cli.generate import generate

    generate(args)


if __name__ == "__main__":
    sys.exit(main())
