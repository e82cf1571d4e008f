"""The rows of `tramontane plan` and `tramontane doctor`, which check a model or a machine before anything is started."""

from pathlib import Path
from typing import get_args

from cluster.cli.options.option import Command, Group, argument, option, switch
from cluster.cli.options.rows.shared import DEVICE, GGUF_FILE, JSON, LOG_LEVEL, MODEL, RAY_ADDRESS_ENV, REVISION
from cluster.cli.options.values import parse_bytes, parse_positive
from cluster.config.serve import DEFAULT_DEPLOYMENT, ServeConfig
from cluster.plan.gpus import GPUS
from cluster.plan.models import FAMILY
from cluster.plan.offers import CLOUDS
from workers.config import EngineConfig, KVCacheDtype, Quantization

DEFAULT_CONTEXT = 8192
DEFAULT_CONCURRENCY, DEFAULT_CPU_CONCURRENCY = 32, 4
DEFAULT_RANK, DEFAULT_BATCH_SIZE, DEFAULT_TRAINING_CONTEXT = 16, 4, 1024  # of --finetune, as of the recipe

PLAN = Command(
    name="plan",
    help="show where a model fits, how fast it can be and what that costs",
    description="Shows on which GPUs a model fits, how fast it can be there at best and what that costs, and writes the YAML that "
    "rents them. Without --gpu it compares all GPUs it knows. With --gpu cpu it compares the forms of the weights on a machine without a "
    "GPU, and prints the `serve` command that fits. With --finetune it shows what fine-tuning needs. Exits with 2 when the model fits "
    "nowhere.",
    run="cluster.cli.plan.main:plan",
    groups=(
        Group(
            None,
            (
                argument(
                    "model",
                    metavar="MODEL",
                    help=f"folder of a checkpoint, a GGUF file, or an id on the Hugging Face Hub; needs no network for {', '.join(FAMILY)}",
                ),
                REVISION,
                GGUF_FILE,
                LOG_LEVEL,
            ),
        ),
        Group(
            "work",
            (
                option(
                    "--context",
                    parse=int,
                    metavar="N",
                    help="tokens of prompt and answer together",
                    shown_default=f"{DEFAULT_CONTEXT}, or the model's maximum where that is less",
                ),
                option(
                    "--concurrency",
                    parse=int,
                    metavar="N",
                    help="requests at the same time",
                    shown_default=f"{DEFAULT_CONCURRENCY}; {DEFAULT_CPU_CONCURRENCY} with --gpu cpu",
                ),
                option(
                    "--prompt-tokens",
                    parse=int,
                    metavar="N",
                    help="tokens of the prompt, out of --context",
                    shown_default="half of them",
                ),
            ),
        ),
        Group(
            "machine",
            (
                option(
                    "--gpu",
                    metavar="NAME",
                    help=f"one of {', '.join(GPUS)}, or NAME:N for N of them in a replica; cpu: a machine without a GPU, like this one",
                    shown_default="compare all",
                ),
                option(
                    "--tensor-parallel-size",
                    "-tp",
                    parse=parse_positive,
                    metavar="N",
                    help="GPUs of a replica",
                    shown_default="compare all",
                ),
                option("--cloud", choices=CLOUDS, help="only machines of this cloud"),
                switch("--spot", help="use spot prices, and write a YAML that requests spot machines"),
                option(
                    "--memory",
                    parse=parse_bytes,
                    metavar="SIZE",
                    help="with --gpu cpu, memory of the machine",
                    shown_default="this machine's",
                ),
                option(
                    "--cores",
                    parse=parse_positive,
                    metavar="N",
                    help="with --gpu cpu, cores of the machine",
                    shown_default="this machine's",
                ),
            ),
        ),
        Group(
            "engine",
            (
                option(
                    "--dtype",
                    choices=("auto", "float32", "bfloat16", "float16"),
                    default="auto",
                    help="auto: the checkpoint's own type; bfloat16 for a checkpoint in float32, which attention on CUDA cannot read; "
                    "float32 is for --gpu cpu, where auto is as in `serve`",
                ),
                option(
                    "--quantization",
                    choices=("none", *get_args(Quantization)),
                    help="the form of the weights, as of `serve`",
                    shown_default="none; with --gpu cpu, compare all",
                ),
                option(
                    "--kv-cache-dtype",
                    choices=get_args(KVCacheDtype),
                    default=EngineConfig.kv_cache_dtype,
                    help="type of the KV cache, as of `serve`",
                ),
                option(
                    "--gpu-memory-utilization",
                    parse=float,
                    metavar="F",
                    default=EngineConfig.gpu_memory_utilization,
                    help="share of a GPU's memory to use, from 0 to 1",
                ),
                switch("--enable-lora", help="leave room for LoRA adapters, as `serve` does"),
                option(
                    "--max-loras",
                    parse=parse_positive,
                    metavar="N",
                    help="with --enable-lora, adapters on the GPU at a time",
                    shown_default=str(EngineConfig.max_loras),
                ),
                option(
                    "--max-lora-rank",
                    parse=parse_positive,
                    metavar="N",
                    help="with --enable-lora, largest rank of an adapter",
                    shown_default=str(EngineConfig.max_lora_rank),
                ),
            ),
        ),
        Group(
            "fine-tuning",
            (
                switch(
                    "--finetune",
                    help="plan fine-tuning with LoRA on one GPU instead of serving, as examples/finetune does it",
                ),
                option(
                    "--rank",
                    parse=parse_positive,
                    metavar="N",
                    help="with --finetune, rank of the adapter",
                    shown_default=str(DEFAULT_RANK),
                ),
                option(
                    "--batch-size",
                    parse=parse_positive,
                    metavar="N",
                    help="with --finetune, conversations in memory at a time, each of --context tokens",
                    shown_default=f"{DEFAULT_BATCH_SIZE}; {DEFAULT_TRAINING_CONTEXT:,} tokens",
                ),
            ),
        ),
        Group(
            "output",
            (
                option(
                    "--write",
                    parse=Path,
                    metavar="FILE",
                    help="write the SkyPilot YAML of the recommended plan to FILE",
                ),
                JSON,
            ),
        ),
    ),
)

DOCTOR = Command(
    name="doctor",
    help="check whether this machine or cluster can serve",
    description="Checks this machine, or every node of a Ray cluster: driver, GPUs, versions, network, memory, disks and model files. "
    "Then runs an all-reduce between real ranks, placed where replicas would run. Uses only free resources, so it does not disturb a "
    "running deployment. Exits with 0 if there are no problems, otherwise with 1.",
    run="cluster.cli.doctor:doctor",
    groups=(
        Group(
            None,
            (
                MODEL,
                REVISION,
                GGUF_FILE,
                option(
                    "--ray-address",
                    metavar="HOST:PORT",
                    env=RAY_ADDRESS_ENV,
                    help="check the nodes of this Ray cluster",
                    shown_default="this machine alone",
                ),
                option(
                    "--tensor-parallel-size",
                    "-tp",
                    parse=parse_positive,
                    metavar="N",
                    help="ranks per replica, placed as `serve` places them",
                    shown_default="one rank per GPU or, without GPUs, one per node",
                ),
                option(
                    "--device",
                    choices=DEVICE.choices,
                    default=DEVICE.default,
                    help="where ranks compute; with cuda, a missing GPU is a problem",
                ),
                option("--host", default=ServeConfig.host, help="address the endpoint will listen on"),
                option("--port", parse=int, default=ServeConfig.port, help="port the endpoint will listen on"),
                option(
                    "--name",
                    default=DEFAULT_DEPLOYMENT,
                    help="name of the deployment, which is also the name of its data folder",
                ),
                switch(
                    "--no-all-reduce", help="skip the all-reduce: starts no ranks, and takes one second instead of ten"
                ),
                option(
                    "--timeout",
                    parse=float,
                    metavar="S",
                    default=30.0,
                    help="time limit in seconds for the ranks to join, and for each collective",
                ),
                switch(
                    "--gpu",
                    help="instead check that this machine's GPU computes what the CPU does, and measure how fast; at most 8 minutes",
                ),
                option(
                    "--gpu-report",
                    parse=Path,
                    metavar="FILE",
                    help="with --gpu, write what was found to FILE as JSON",
                ),
                switch("--strict", help="also exit with 1 for warnings"),
                switch("--json", help="print the findings and the facts they come from as JSON"),
                LOG_LEVEL,
            ),
        ),
    ),
)
