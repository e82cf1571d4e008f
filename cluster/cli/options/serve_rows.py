"""The rows of `tramontane serve` and `tramontane generate`."""

import os
from collections.abc import Sequence
from operator import not_
from pathlib import Path

from cluster.cli.options.adapter_rows import ADAPTERS, GENERATE_ADAPTERS, LORA, LORA_ENGINE_ROWS
from cluster.cli.options.option import Command, Group, option, switch
from cluster.cli.options.profile_rows import PROFILE
from cluster.cli.options.shared_rows import (
    ENGINE,
    GGUF_FILE,
    JOIN_RAY,
    LOG_LEVEL,
    MODEL,
    NAME,
    PLACEMENT_TIMEOUT,
    REVISION,
    SERVED_NAME,
    TENSOR_PARALLEL_SIZE,
    serve_field,
)
from cluster.cli.options.values import parse_positive, parse_replicas
from cluster.config.platform import PLATFORM_ENV, PLATFORMS, Platform, recognize
from cluster.config.sampling_defaults import generation_config
from cluster.config.serve import (
    API_KEY_ENV,
    BATCH_STORE_ENV,
    CHAT_TEMPLATES,
    METRICS_PREFIXES,
    ServeConfig,
)
from cluster.keys.file import API_KEYS_ENV
from cluster.protocol.notice import PREEMPTION_NOTICES
from cluster.protocol.routing import ROUTING_POLICIES
from cluster.router.admission.bounds import MAX_QUEUED_TOKENS, QUEUE_TIMEOUT_S
from cluster.system.files import has_files
from cluster.system.log import LOG_FORMATS
from cluster.tracing.settings import tracing_config
from workers.errors import ConfigError
from workers.tracing.settings import TracingConfig


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


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _platform(asked: str | None) -> Platform | None:
    return recognize(os.environ, asked=asked or "auto", has_files=has_files)


def _tracing(endpoint: str | None) -> TracingConfig | None:
    return tracing_config(endpoint, os.environ)


def _tuple(values: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(values or ())


CONFIG = option(
    "--config",
    parse=Path,
    metavar="FILE",
    help="YAML file that names several models to serve at this address, with options of this command for each and for all; see "
    "docs/several-models.md",
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

HTTP = Group(
    "HTTP",
    (
        option(
            "--host",
            fills=serve_field("host"),
            help="address to listen on; one that other machines can reach requires an API key",
        ),
        option("--port", parse=int, fills=serve_field("port"), help="port to listen on; 0 picks a free one"),
        option(
            "--api-key",
            metavar="KEY",
            env=API_KEY_ENV,
            fills=serve_field("api_key"),
            help="key that clients must send; the environment variable keeps it out of the process list",
        ),
        option(
            "--api-keys",
            parse=Path,
            metavar="FILE",
            env=API_KEYS_ENV,
            fills=serve_field("api_keys", convert=_absolute),
            help="file of keys with limits, made by `tramontane keys create`; the server reloads it when it changes",
        ),
        option(
            "--tls-cert",
            parse=Path,
            metavar="FILE",
            fills=serve_field("tls_cert", convert=_absolute),
            help="certificate chain in PEM format, for https; the server reloads it when it changes",
        ),
        option(
            "--tls-key",
            parse=Path,
            metavar="FILE",
            fills=serve_field("tls_key", convert=_absolute),
            help="private key of --tls-cert",
        ),
        option(
            "--cors-origin",
            kind="list",
            metavar="ORIGIN",
            default=None,
            fills=serve_field("cors_origins", convert=_tuple),
            help="web origin whose pages may call the API; may be repeated",
        ),
        switch(
            "--public-health",
            fills=serve_field("public_health"),
            help="let /health/ready and /ping answer without a key, and then say no more than ready or not",
        ),
        option(
            "--platform",
            choices=("auto", "none", *PLATFORMS),
            env=PLATFORM_ENV,
            fills=serve_field("platform", convert=_platform),
            help="hosting platform whose port, paths and model to use where nothing else is given; auto: what the environment shows",
            shown_default="auto",
        ),
        switch("--no-embeddings", fills=serve_field("serves_embeddings", convert=not_), help="turn off /v1/embeddings"),
        switch(
            "--strict",
            fills=serve_field("strict"),
            help="refuse request fields that are unknown or have no effect, instead of naming them in X-Tramontane-Ignored",
        ),
        SERVED_NAME,
        CHAT_TEMPLATE,
        GENERATION_CONFIG,
        option(
            "--gateways",
            parse=parse_positive,
            metavar="N",
            fills=serve_field("num_gateways"),
            help="HTTP servers, including this one; the others run on other nodes where there are any",
        ),
    ),
)

BATCHES = Group(
    "batches",
    (
        option(
            "--data-dir",
            parse=Path,
            metavar="DIR",
            fills=serve_field("data_dir", convert=_absolute),
            help="folder for uploaded files, batches, stored responses and adapters",
            shown_default="tramontane/NAME in XDG_DATA_HOME or ~/.local/share",
        ),
        option(
            "--batch-store",
            metavar="URL",
            env=BATCH_STORE_ENV,
            ignore_env_with="no_batches",
            fills=serve_field("batch_store"),
            help="PostgreSQL database, postgresql://..., for batches and responses of gateways on several hosts; the environment variable "
            "keeps it out of the process list",
            shown_default="a file in the data folder",
        ),
        switch(
            "--no-batches",
            fills=serve_field("serves_batches", convert=not_),
            help="turn off /v1/files and /v1/batches, and store no responses",
        ),
    ),
)

REPLICAS = option(
    "--replicas",
    parse=parse_replicas,
    metavar="N|MIN:MAX",
    default=(ServeConfig.min_replicas, ServeConfig.max_replicas),
    fills=serve_field("min_replicas", "max_replicas"),
    help="copies of the model; with MIN:MAX the load decides how many run, and MIN may be 0",
    shown_default=str(ServeConfig.min_replicas),
)
SCALE_DOWN_AFTER = option(
    "--scale-down-after",
    parse=float,
    metavar="S",
    fills=serve_field("scale_down_after_s"),
    help="seconds a replica must be idle before it is removed",
)
TTFT_OBJECTIVE = option(
    "--ttft-objective",
    parse=float,
    metavar="S",
    fills=serve_field("ttft_objective_s"),
    help="time to first token, in seconds, that scaling aims for",
)

CLUSTER = Group(
    "cluster",
    (
        REPLICAS,
        TENSOR_PARALLEL_SIZE,
        JOIN_RAY,
        PLACEMENT_TIMEOUT,
        NAME,
        option(
            "--drain-timeout",
            parse=float,
            metavar="S",
            fills=serve_field("drain_timeout_s"),
            help="seconds that running requests may take to finish at shutdown and drain",
        ),
        option(
            "--preemption-notices",
            choices=PREEMPTION_NOTICES,
            fills=serve_field("preemption_notices"),
            help="which cloud's preemption notices to act on; auto: those of the cloud this machine runs in",
        ),
        SCALE_DOWN_AFTER,
        TTFT_OBJECTIVE,
    ),
)

ROUTING = Group(
    "routing",
    (
        option(
            "--routing-policy",
            choices=ROUTING_POLICIES,
            fills=serve_field("routing_policy"),
            help="how to choose a replica for a request: prefix weighs its cached prefix and its load",
        ),
        option(
            "--max-queued-tokens",
            parse=parse_positive,
            metavar="N",
            default=MAX_QUEUED_TOKENS,
            fills=serve_field("max_queued_tokens"),
            help="most prompt tokens waiting for a replica; above it, new requests get 429",
        ),
        option(
            "--queue-timeout",
            parse=float,
            metavar="S",
            default=QUEUE_TIMEOUT_S,
            fills=serve_field("queue_timeout_s"),
            help="seconds a request may wait for a replica before it gets 503",
        ),
    ),
)

MONITORING = Group(
    "monitoring",
    (
        option(
            "--metrics-prefix",
            choices=METRICS_PREFIXES,
            fills=serve_field("metrics_prefix"),
            help="prefix of the metrics' names; vllm: for dashboards made for vLLM",
        ),
        option(
            "--log-format",
            choices=LOG_FORMATS,
            fills=serve_field("log_format"),
            help="format of the log; json: one object per line",
        ),
        switch("--log-prompts", fills=serve_field("log_prompts"), help="write prompts into the log, at level info"),
        option(
            "--otlp-endpoint",
            "--otlp-traces-endpoint",
            metavar="URL",
            fills=serve_field("tracing", convert=_tracing),
            help="OpenTelemetry collector to send traces to, over OTLP/HTTP; OpenTelemetry's own variables work too, such as "
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            shown_default="no traces",
        ),
    ),
)

# What each deployment in the file of --config may say for itself; all others are about the server.
OWN_OPTIONS = (MODEL, REVISION, GGUF_FILE, SERVED_NAME, LORA)  # only there
DEPLOYMENT_OPTIONS = (
    *OWN_OPTIONS,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    *LORA_ENGINE_ROWS,
    REPLICAS,
    TENSOR_PARALLEL_SIZE,
    PLACEMENT_TIMEOUT,
    SCALE_DOWN_AFTER,
    TTFT_OBJECTIVE,
    *ROUTING.options,
    *ENGINE.options,
)

SERVE = Command(
    name="serve",
    help="start an OpenAI-compatible endpoint",
    description="Starts Ray (or joins a running one), the model's ranks and an OpenAI-compatible HTTP endpoint.",
    run="cluster.cli.serve.main:serve",
    groups=(
        Group(None, (MODEL, CONFIG, REVISION, GGUF_FILE, LOG_LEVEL)),
        HTTP,
        ADAPTERS,
        BATCHES,
        CLUSTER,
        ROUTING,
        MONITORING,
        PROFILE,
        ENGINE,
    ),
)

GENERATE = Command(
    name="generate",
    help="complete one prompt in this process",
    description="Completes one prompt in this process, without Ray and without HTTP.",
    run="cluster.cli.generate:generate",
    constants=(("tensor_parallel_size", 1),),
    groups=(
        Group(None, (MODEL, REVISION, GGUF_FILE, LOG_LEVEL)),
        Group(
            "sampling",
            (
                option("--prompt", metavar="TEXT", default="def fibonacci(n):", help="text to continue"),
                option("--max-tokens", parse=int, metavar="N", default=128, help="most tokens to generate"),
                option(
                    "--temperature", parse=float, metavar="T", default=0.0, help="0 always picks the most likely token"
                ),
                option(
                    "--top-p",
                    parse=float,
                    metavar="P",
                    default=1.0,
                    help="sample only from the most likely tokens whose probabilities add up to P",
                ),
                option(
                    "--seed",
                    parse=int,
                    metavar="N",
                    help="the same seed gives the same text",
                    shown_default="a random one",
                ),
            ),
        ),
        GENERATE_ADAPTERS,
        PROFILE,
        ENGINE,
    ),
)
