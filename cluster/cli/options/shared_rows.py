"""Rows that several commands share: the model, the engine, the server to talk to, the log level."""

from operator import not_
from pathlib import Path

from cluster.cli.options.option import Fills, Group, argument, option, switch
from cluster.cli.options.values import parse_bytes, parse_positive, show_bytes
from cluster.config.engine import BLOCK_SIZES, MAX_DEFAULT_MODEL_LEN
from cluster.config.serve import API_KEY_ENV, DEFAULT_DEPLOYMENT, ServeConfig
from cluster.system.log import LOG_LEVELS
from cluster.system.net import url_of
from workers.config import EngineConfig

RAY_ADDRESS_ENV = "RAY_ADDRESS"  # Ray's own variable


def serve_field(*names: str, **convert: object) -> Fills:
    return Fills(ServeConfig, names, **convert)  # type: ignore[arg-type]  # `convert` is a function of any value


def engine_field(*names: str, **convert: object) -> Fills:
    return Fills(EngineConfig, names, **convert)  # type: ignore[arg-type]  # as above


MODEL = argument(
    "model",
    metavar="MODEL",
    is_optional=True,
    help="folder of a checkpoint, or its id on the Hugging Face Hub",
    shown_default="the demo model",
)
REVISION = option("--revision", help="branch, tag or commit on the Hub")
LOG_LEVEL = option(
    "--log-level",
    choices=LOG_LEVELS,
    fills=serve_field("log_level"),
    help="what is logged; debug also shows tracebacks",
)
JSON = switch("--json", help="print JSON")
NAME = option(
    "--name",
    default=DEFAULT_DEPLOYMENT,
    fills=serve_field("deployment"),
    help="the deployment's name in Ray; one Ray cluster can run several deployments",
)
TENSOR_PARALLEL_SIZE = option(
    "--tensor-parallel-size",
    "-tp",
    parse=int,
    metavar="N",
    fills=engine_field("tensor_parallel_size"),
    help="ranks of each replica, one accelerator each",
)
JOIN_RAY = option(
    "--ray-address",
    metavar="ADDRESS",
    fills=serve_field("ray_address"),
    help="Ray cluster to join",
    shown_default="start one on this machine",
)
SERVED_NAME = option(
    "--served-model-name",
    metavar="NAME",
    fills=serve_field("model_name"),
    help="the model's name in requests",
    shown_default="MODEL",
)
DEVICE = option(
    "--device",
    choices=("auto", "cpu", "cuda"),
    default="auto",
    fills=engine_field("device"),
    help="where to compute; auto: cuda where there is a GPU",
)
API_KEY = option("--api-key", metavar="KEY", env=API_KEY_ENV, help="the server's API key")
CA_CERT = option(
    "--ca-cert", parse=Path, metavar="FILE", help="PEM file with the certificate authority to trust for https"
)

URL_ROWS = (
    option("--url", default=url_of(ServeConfig.host, ServeConfig.port), help="address of a gateway"),
    CA_CERT,
    API_KEY,
    LOG_LEVEL,
)

ENGINE_ROWS = (
    DEVICE,
    option(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        fills=engine_field("dtype"),
        help="type of the weights; auto: float32 on the CPU, the checkpoint's own type on CUDA",
    ),
    option(
        "--max-model-len",
        parse=parse_positive,
        metavar="N",
        default=None,
        fills=engine_field("max_model_len"),
        help="most tokens of prompt and output together",
        shown_default=f"the model's maximum, at most {MAX_DEFAULT_MODEL_LEN}",
    ),
    option(
        "--max-num-seqs",
        parse=parse_positive,
        metavar="N",
        fills=engine_field("max_num_seqs"),
        help="most sequences computed at once",
    ),
    option(
        "--max-num-batched-tokens",
        parse=parse_positive,
        metavar="N",
        fills=engine_field("max_num_batched_tokens"),
        help="most tokens computed in one step",
    ),
    option(
        "--block-size",
        parse=parse_positive,
        metavar="N",
        default=None,
        fills=engine_field("block_size"),
        help="tokens per KV block",
        shown_default=f"{BLOCK_SIZES['cpu']} on the CPU, {BLOCK_SIZES['cuda']} on CUDA",
    ),
    option(
        "--num-kv-blocks",
        parse=parse_positive,
        metavar="N",
        fills=engine_field("num_kv_blocks"),
        help="KV blocks per rank, instead of an amount of memory",
        shown_default="from the memory",
    ),
    option(
        "--kv-cache-memory",
        parse=parse_bytes,
        metavar="SIZE",
        fills=engine_field("kv_cache_bytes"),
        help="memory for KV blocks per rank, on the CPU",
        shown_default=show_bytes(EngineConfig.kv_cache_bytes),
    ),
    option(
        "--gpu-memory-utilization",
        parse=float,
        metavar="F",
        fills=engine_field("gpu_memory_utilization"),
        help="share of a GPU's memory to use, from 0 to 1",
    ),
    switch(
        "--no-prefix-caching",
        fills=engine_field("enable_prefix_caching", convert=not_),
        help="compute every prompt in full instead of reusing cached prefixes",
    ),
)
ENGINE = Group("engine", ENGINE_ROWS)
