"""`tramontane plan`: what it prints. Needs no GPU, no cloud account and, for the models it knows, no network."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence

from rich.text import Text

from cluster.cli.options.rows.check import DEFAULT_CONCURRENCY, DEFAULT_CONTEXT, DEFAULT_CPU_CONCURRENCY, PLAN
from cluster.cli.plan.finetune import plan_finetune
from cluster.config.dtype import keeps_narrow, stored_dtype
from cluster.plan.catalog import known_offers
from cluster.plan.cpu.machine import CpuMachine, assumed
from cluster.plan.cpu.planner import CpuQuestion, make_cpu_plans
from cluster.plan.cpu.planner import refusal as cpu_refusal
from cluster.plan.cpu.report import cpu_json, cpu_report
from cluster.plan.gpus import GPUS, Gpu, find_gpus
from cluster.plan.models import PlannedModel, describe_model
from cluster.plan.planner import Question, make_plans, refusal
from cluster.plan.report import as_json, report
from cluster.plan.roofline import Workload
from cluster.plan.task_yaml import write_task
from cluster.terminal.tables import answer_console
from workers.config import Dtype, EngineConfig
from workers.device.cpu import read_cpu
from workers.device.memory import read_memory
from workers.errors import ConfigError
from workers.native.bfloat16 import bfloat16_support

CPU = "cpu"
# Options that mean something for one kind of machine only.
GPU_OPTIONS = (
    *("--cloud", "--spot", "--write", "--gpu-memory-utilization", "--tensor-parallel-size"),
    *("--enable-lora", "--max-loras", "--max-lora-rank"),
)
CPU_OPTIONS = ("--memory", "--cores")


def plan(args: Namespace) -> None:
    """Prints the plans. Raises ConfigError for invalid options, and if nothing fits."""
    if args.finetune:
        plan_finetune(args)
        return
    for name in ("rank", "batch_size"):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect without --finetune.", remedy="Leave it out.", param=flag)
    is_cpu = args.gpu is not None and args.gpu.strip().lower() == CPU
    _check_options(args, is_cpu=is_cpu)
    gpus, size = (tuple(GPUS.values()), args.tensor_parallel_size) if args.gpu is None or is_cpu else _gpus(args)
    model = describe_model(args.model, revision=args.revision, gguf_file=args.gguf_file)
    for text in model.warnings:
        print(f"warning: {text}", file=sys.stderr)
    if is_cpu:
        _plan_cpu(args, model)
    else:
        _plan_gpus(args, model, gpus, tensor_parallel_size=size)


def _gpus(args: Namespace) -> tuple[Sequence[Gpu], int | None]:
    """The GPU of --gpu, and how many of them a replica has. Raises ConfigError."""
    gpu, count = find_gpus(args.gpu)
    size = args.tensor_parallel_size
    if count is not None and size is not None and size != count:
        raise ConfigError(
            f"--gpu {args.gpu} and --tensor-parallel-size {size} are different numbers of GPUs.",
            remedy="Leave one of them out.",
            param="--tensor-parallel-size",
        )
    return (gpu,), size if count is None else count


def _plan_gpus(args: Namespace, model: PlannedModel, gpus: Sequence[Gpu], *, tensor_parallel_size: int | None) -> None:
    question = _question(args, model)
    offers = known_offers()
    plans = make_plans(question, gpus=gpus, tensor_parallel_size=tensor_parallel_size, offers=offers)
    best = plans[0]
    if args.json:
        print(json.dumps(as_json(question, plans), indent=2))
    else:
        answer_console().print(report(question, plans, one_gpu=args.gpu is not None))
    if not best.fits:
        raise refusal(question, plans, offers=offers)
    if args.write is not None:
        write_task(args.write, question, best)
        print(f"Wrote {args.write}. Its first lines show how to launch it.", file=sys.stderr)


def _plan_cpu(args: Namespace, model: PlannedModel) -> None:
    stored = model.config.dtype if model.folder is None else stored_dtype(model.folder, model.config)
    question = CpuQuestion(
        model=model,
        machine=_machine(args),
        workload=_workload(args, model, concurrency=DEFAULT_CPU_CONCURRENCY),
        dtype=None if args.dtype == "auto" else args.dtype,
        quantization="all" if args.quantization is None else None if args.quantization == "none" else args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        keeps_narrow=keeps_narrow("float32", device="cpu", stored=stored, model=model.config),
    )
    plans = make_cpu_plans(question)
    if args.json:
        print(json.dumps(cpu_json(question, plans), indent=2))
    else:
        console = answer_console()
        console.print(cpu_report(question, plans))
        if plans[0].fits:
            # In one line however narrow the terminal is, so that it can be copied.
            console.print(Text(f"\nRecommended: {plans[0].command}"), soft_wrap=True)
    if not plans[0].fits:
        raise cpu_refusal(question, plans)


def _machine(args: Namespace) -> CpuMachine:
    """This machine, or one of its kind with other sizes. Raises ConfigError."""
    memory = read_memory()
    if args.memory is None and memory is None:
        raise ConfigError("This system does not say how much memory it has.", remedy="Add --memory.", param="--memory")
    return assumed(
        num_cores=args.cores or read_cpu().num_cores,
        memory_bytes=args.memory or (memory.total_bytes if memory is not None else 0),
        instructions=bfloat16_support().instructions,
    )


def _check_options(args: Namespace, *, is_cpu: bool) -> None:
    """Raises ConfigError for an option that would have no effect."""
    rows = {option.names[0]: option for option in PLAN.options}
    for name in GPU_OPTIONS if is_cpu else CPU_OPTIONS:
        if getattr(args, rows[name].dest) != rows[name].default:
            raise ConfigError(
                f"{name} has no effect {'with' if is_cpu else 'without'} --gpu cpu.",
                remedy="Leave it out." if is_cpu else "Leave it out, or add --gpu cpu.",
                param=name,
            )
    for name in ("--max-loras", "--max-lora-rank"):
        if getattr(args, rows[name].dest) is not None and not args.enable_lora:
            raise ConfigError(
                f"{name} has no effect without --enable-lora.",
                remedy="Leave it out, or add --enable-lora.",
                param=name,
            )
    if args.dtype == "float32" and not is_cpu:
        raise ConfigError(
            "--dtype float32 does not work on GPUs, because attention on CUDA cannot read it.",
            remedy="Use bfloat16 or float16, or add --gpu cpu.",
            param="--dtype",
        )


def _question(args: Namespace, model: PlannedModel) -> Question:
    return Question(
        model=model,
        workload=_workload(args, model, concurrency=DEFAULT_CONCURRENCY),
        dtype=_dtype(args.dtype, model),
        quantization=None if args.quantization == "none" else args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
        cloud=args.cloud,
        spot=args.spot,
        enable_lora=args.enable_lora,
        max_loras=args.max_loras or EngineConfig.max_loras,
        max_lora_rank=args.max_lora_rank or EngineConfig.max_lora_rank,
    )


def _workload(args: Namespace, model: PlannedModel, *, concurrency: int) -> Workload:
    """concurrency: without the option."""
    longest = model.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if args.context is None else args.context
    if not 2 <= context <= longest:
        raise ConfigError(
            f"--context {context} does not work with {args.model}.",
            remedy=f"Use 2 to {longest} tokens.",
            param="--context",
        )
    prompt_tokens = context // 2 if args.prompt_tokens is None else args.prompt_tokens
    if not 1 <= prompt_tokens < context:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} leaves no room for an answer in --context {context}.",
            remedy=f"Use 1 to {context - 1}.",
            param="--prompt-tokens",
        )
    if args.concurrency is not None:
        concurrency = args.concurrency
    if concurrency < 1:
        raise ConfigError(
            f"--concurrency {concurrency} is not a number of requests.",
            remedy="Use at least 1.",
            param="--concurrency",
        )
    return Workload(context=context, concurrency=concurrency, prompt_tokens=prompt_tokens)


def _dtype(option: str, model: PlannedModel) -> Dtype:
    if option == "auto":
        return "bfloat16" if model.config.dtype == "float32" else model.config.dtype
    return "float16" if option == "float16" else "bfloat16"
