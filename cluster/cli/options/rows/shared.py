"""Rows that several commands share: the model and how it is talked to, the engine, the server to ask, the log level."""

from operator import not_
from pathlib import Path
from typing import get_args

from cluster.cli.options.option import Fills, Group, argument, option, switch, toggle
from cluster.cli.options.values import parse_bytes, parse_field, parse_positive, parse_rate, show_bytes
from cluster.config.engine import FLASH_BLOCK_SIZE, MAX_DEFAULT_MODEL_LEN
from cluster.config.sampling_defaults import generation_config
from cluster.config.serve import API_KEY_ENV, CHAT_TEMPLATES, DEFAULT_DEPLOYMENT, ServeConfig
from cluster.system.log import LOG_LEVELS
from cluster.system.net import url_of
from workers.config import AttentionChoice, EngineConfig, KVCacheDtype, Quantization
from workers.device.sizes import LARGEST_GPU, MAX_NUM_SEQS, SMALLEST_GPU
from workers.errors import ConfigError

RAY_ADDRESS_ENV = "RAY_ADDRESS"  # Ray's own variable


def serve_field(*names: str, **convert: object) -> Fills:
    return Fills(ServeConfig, names, **convert)  # type: ignore[arg-type]  # `convert` is a function of any value


def engine_field(*names: str, **convert: object) -> Fills:
    return Fills(EngineConfig, names, **convert)  # type: ignore[arg-type]  # as above


def absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def chat_template(requested: str) -> str:
    """One of CHAT_TEMPLATES, or a .jinja file's absolute path. Raises ConfigError."""
    if requested in CHAT_TEMPLATES:
        return requested
    path = Path(requested).expanduser().absolute()
    if not requested.endswith(".jinja") or not path.is_file():
        raise ConfigError(
            f"--chat-template {requested} is neither a .jinja file that exists nor one of {', '.join(CHAT_TEMPLATES)}.",
            param="--chat-template",
        )
    return str(path)


MODEL = argument(
    "model",
    metavar="MODEL",
    is_optional=True,
    help="folder of a checkpoint, a GGUF file, or an id on the Hugging Face Hub",
    shown_default="the demo model",
)
REVISION = option("--revision", help="branch, tag or commit on the Hub")
GGUF_FILE = option(
    "--gguf-file",
    metavar="NAME",
    help="the GGUF file in MODEL to use, or the first of its parts",
    shown_default="the only one",
)
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
CHAT_TEMPLATE = option(
    "--chat-template",
    metavar="NAME",
    fills=serve_field("chat_template", convert=chat_template),
    help=f"one of {', '.join(CHAT_TEMPLATES)}, or the path of a .jinja file; auto: the checkpoint's own template, or the version of "
    "mistral-common's that its tokenizer names; jinja: the checkpoint's own",
)
GENERATION_CONFIG = option(
    "--generation-config",
    metavar="auto|none|DIR",
    fills=serve_field("generation_config", convert=generation_config),
    help="where sampling parameters that a request leaves out come from: the checkpoint's generation_config.json, none, or the one in DIR",
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
PLACEMENT_TIMEOUT = option(
    "--placement-timeout",
    parse=float,
    metavar="S",
    fills=serve_field("placement_timeout_s"),
    help="with --ray-address: seconds that the first replica may wait for nodes with its CPUs or GPUs; inf for no limit",
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
    help="where to compute; auto: cuda where there is a GPU; cuda: an error where torch can use none",
)
API_KEY = option("--api-key", metavar="KEY", env=API_KEY_ENV, help="the server's API key")
CA_CERT = option(
    "--ca-cert", parse=Path, metavar="FILE", help="PEM file with the certificate authority to trust for https"
)

SET = option(
    "--set",
    kind="list",
    parse=parse_field,
    metavar="FIELD=VALUE",
    help="any other field of the requests; the value in JSON, and text where it is not JSON: --set top_k=40 --set user=me; may be "
    "repeated",
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
        help="type of the weights; auto: the checkpoint's own type on CUDA; on the CPU bfloat16 for a checkpoint in bfloat16 where the "
        "CPU has instructions for it, otherwise float32, also for quantized GGUF files",
    ),
    option(
        "--quantization",
        choices=get_args(Quantization),
        fills=engine_field("quantization"),
        help="keep weight matrices in 8 or 4 bits, with a scale for every 32 weights, or in 8-bit floats (fp8), with a scale for "
        "every row; made while loading; less memory and more tokens per second, slightly different answers",
        shown_default="none",
    ),
    option(
        "--kv-cache-dtype",
        choices=get_args(KVCacheDtype),
        fills=engine_field("kv_cache_dtype"),
        help="type of the KV cache; int8, fp8: 8 bits with a scale for each token and head, so half the memory of bfloat16; slightly "
        "different answers, int8 the closer ones; auto: that of --dtype",
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
        default=None,
        fills=engine_field("max_num_seqs"),
        help="most sequences computed at once",
        shown_default=f"{EngineConfig.max_num_seqs} on the CPU, {MAX_NUM_SEQS} on CUDA",
    ),
    option(
        "--max-num-batched-tokens",
        parse=parse_positive,
        metavar="N",
        default=None,
        fills=engine_field("max_num_batched_tokens"),
        help="most tokens computed in one step",
        shown_default=f"{EngineConfig.max_num_batched_tokens} on the CPU; on CUDA {SMALLEST_GPU.max_num_batched_tokens} to "
        f"{LARGEST_GPU.max_num_batched_tokens}, by the GPU's memory and speed",
    ),
    option(
        "--prompt-stretch",
        parse=parse_rate,
        metavar="F",
        fills=engine_field("prompt_stretch"),
        help="on the CPU, a step that computes prompts next to running streams takes at most F times as long as one without; the prompts "
        "then take F / (F - 1) times as long as alone: 5 keeps time to first token short, 2 keeps gaps short",
    ),
    option(
        "--block-size",
        parse=parse_positive,
        metavar="N",
        default=None,
        fills=engine_field("block_size"),
        help="tokens per KV block",
        shown_default=f"{EngineConfig.block_size}; {FLASH_BLOCK_SIZE} with --attention-backend flash",
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
    switch(
        "--deterministic",
        fills=engine_field("deterministic"),
        help="on CUDA, compute a token's logits with the same bits whatever else is computed, so that streams continue byte for byte on "
        "another replica with the same type of GPU; slower; no effect on the CPU, where float32 is always computed so",
    ),
    switch(
        "--no-cuda-graphs",
        fills=engine_field("cuda_graphs", convert=not_),
        help="call each kernel of a decode step by itself instead of replaying a graph of them; changes no token",
    ),
    toggle(
        "--overlap",
        fills=engine_field("overlap"),
        help="launch a step before the tokens of the last one are read, so that the device does not wait for the host; changes no token",
        shown_default="on with CUDA, off on the CPU",
    ),
    option(
        "--attention-backend",
        choices=get_args(AttentionChoice),
        fills=engine_field("attention_backend"),
        help="kernels of attention; auto: triton on CUDA, flash where it cannot run; native (compiled) on the CPU; sdpa, the slow "
        "reference, where none of these can",
    ),
)
ENGINE = Group("engine", ENGINE_ROWS)
