"""`tramontane plan`: its options and what it prints. Needs no GPU, no cloud account and, for the models it knows, no network."""

import argparse
import json
import sys
from pathlib import Path

from cluster.plan.catalog import known_offers
from cluster.plan.gpus import GPUS, find_gpu
from cluster.plan.models import FAMILY, PlannedModel, describe_model
from cluster.plan.offers import CLOUDS
from cluster.plan.planner import Question, make_plans, refusal
from cluster.plan.report import as_json, report
from cluster.plan.roofline import Workload
from cluster.plan.task_yaml import write_task
from cluster.system.log import LOG_LEVELS
from cluster.terminal.tables import answer_console
from workers.config import Dtype
from workers.errors import ConfigError

DEFAULT_CONTEXT = 8192


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="say where a model fits, how fast it can be there and what that costs",
        description="Says on which GPUs a model fits, how fast it can be there at best and what that costs, and writes the YAML that "
        "rents them. Without --gpu it compares all it knows. Exit code 2 when nothing fits.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("model", metavar="MODEL", help=f"folder or Hub id; known without network: {', '.join(FAMILY)}")
    plan.add_argument("--revision", help="branch, tag or commit on the Hub")
    work = plan.add_argument_group("work")
    work.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of prompt and answer together (default: {DEFAULT_CONTEXT}, or what the model was made for)",
    )
    work.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests at a time (default: 32)")
    work.add_argument("--prompt-tokens", type=int, metavar="N", help="of the context (default: half)")
    machine = plan.add_argument_group("machine")
    machine.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    machine.add_argument(
        "--tensor-parallel-size", "-tp", type=int, metavar="N", help="GPUs of a replica (default: compare all)"
    )
    machine.add_argument("--cloud", choices=CLOUDS, help="only machines of this one")
    machine.add_argument("--spot", action="store_true", help="go by spot prices, and write a YAML that asks for spot")
    engine = plan.add_argument_group("engine")
    engine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16"),
        default="auto",
        help="auto: the checkpoint's own; bfloat16 for one in float32, which attention on CUDA cannot read",
    )
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="share to use (default: 0.9)"
    )
    output = plan.add_argument_group("output")
    output.add_argument("--write", type=Path, metavar="FILE", help="write the SkyPilot YAML of the plan to take")
    output.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")


def _plan(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that cannot work, and when nothing fits."""
    gpus = tuple(GPUS.values()) if args.gpu is None else (find_gpu(args.gpu),)
    question = _question(args, describe_model(args.model, revision=args.revision))
    offers = known_offers()
    plans = make_plans(question, gpus=gpus, tensor_parallel_size=args.tensor_parallel_size, offers=offers)
    best = plans[0]
    if args.json:
        print(json.dumps(as_json(question, plans), indent=2))
    else:
        answer_console().print(report(question, plans, one_gpu=args.gpu is not None))
    if not best.fits:
        raise refusal(question, plans, offers=offers)
    if args.write is not None:
        write_task(args.write, question, best)
        print(f"Wrote {args.write}; its first lines say how to launch it.", file=sys.stderr)


def _question(args: argparse.Namespace, model: PlannedModel) -> Question:
    longest = model.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if args.context is None else args.context
    if not 2 <= context <= longest:
        raise ConfigError(f"--context {context} cannot be used; {args.model} takes 2 to {longest} tokens.")
    prompt_tokens = context // 2 if args.prompt_tokens is None else args.prompt_tokens
    if not 1 <= prompt_tokens < context:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} leaves no room for an answer in --context {context}; use 1 to {context - 1}."
        )
    if args.concurrency < 1:
        raise ConfigError(f"--concurrency {args.concurrency} is no load; use at least 1.")
    return Question(
        model=model,
        workload=Workload(context=context, concurrency=args.concurrency, prompt_tokens=prompt_tokens),
        dtype=_dtype(args.dtype, model),
        gpu_memory_utilization=args.gpu_memory_utilization,
        cloud=args.cloud,
        spot=args.spot,
    )


def _dtype(asked: str, model: PlannedModel) -> Dtype:
    if asked == "auto":
        return "bfloat16" if model.config.dtype == "float32" else model.config.dtype
    return "float16" if asked == "float16" else "bfloat16"
