"""The rows of `tramontane serve`. Those about its HTTP server are in http.py, those about adapters in adapters.py."""

import os
from operator import not_
from pathlib import Path

from cluster.cli.options.option import Command, Group, option, switch
from cluster.cli.options.rows.adapters import ADAPTERS, LORA, LORA_ENGINE_ROWS
from cluster.cli.options.rows.http import HTTP
from cluster.cli.options.rows.profile import PROFILE
from cluster.cli.options.rows.shared import (
    CHAT_TEMPLATE,
    ENGINE,
    GENERATION_CONFIG,
    GGUF_FILE,
    JOIN_RAY,
    LOG_LEVEL,
    MODEL,
    NAME,
    PLACEMENT_TIMEOUT,
    REVISION,
    SERVED_NAME,
    TENSOR_PARALLEL_SIZE,
    absolute,
    serve_field,
)
from cluster.cli.options.values import parse_positive, parse_replicas
from cluster.config.serve import BATCH_STORE_ENV, METRICS_PREFIXES, ServeConfig
from cluster.protocol.notice import PREEMPTION_NOTICES
from cluster.protocol.routing import ROUTING_POLICIES
from cluster.router.admission.bounds import MAX_QUEUED_TOKENS, QUEUE_TIMEOUT_S
from cluster.system.log import LOG_FORMATS
from cluster.tracing.settings import tracing_config
from workers.tracing.settings import TracingConfig


def _tracing(endpoint: str | None) -> TracingConfig | None:
    return tracing_config(endpoint, os.environ)


CONFIG = option(
    "--config",
    parse=Path,
    metavar="FILE",
    help="YAML file that names several models to serve at this address, with options of this command for each and for all; see "
    "docs/several-models.md",
)

BATCHES = Group(
    "batches",
    (
        option(
            "--data-dir",
            parse=Path,
            metavar="DIR",
            fills=serve_field("data_dir", convert=absolute),
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
