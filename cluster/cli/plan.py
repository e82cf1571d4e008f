"""`tramontane plan`: what it prints. Needs no GPU, no cloud account and, for the models it knows, no network."""

import json
import sys
from argparse import Namespace

from cluster.cli.options.check_rows import DEFAULT_CONTEXT
from cluster.plan.catalog import known_offers
from cluster.plan.gpus import GPUS, find_gpu
from cluster.plan.models import PlannedModel, describe_model
from cluster.plan.planner import Question, make_plans, refusal
from cluster.plan.report import as_json, report
from cluster.plan.roofline import Workload
from cluster.plan.task_yaml import write_task
from cluster.terminal.tables import answer_console
from workers.config import Dtype
from workers.errors import ConfigError


def plan(args: Namespace) -> None:
    """Prints the plans. Raises ConfigError for invalid options, and if nothing fits."""
    gpus = tuple(GPUS.values()) if args.gpu is None else (find_gpu(args.gpu),)
    model = describe_model(args.model, revision=args.revision)
    for text in model.warnings:
        print(f"warning: {text}", file=sys.stderr)
    question = _question(args, model)
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
        print(f"Wrote {args.write}. Its first lines show how to launch it.", file=sys.stderr)


def _question(args: Namespace, model: PlannedModel) -> Question:
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
    if args.concurrency < 1:
        raise ConfigError(
            f"--concurrency {args.concurrency} is not a number of requests.",
            remedy="Use at least 1.",
            param="--concurrency",
        )
    return Question(
        model=model,
        workload=Workload(context=context, concurrency=args.concurrency, prompt_tokens=prompt_tokens),
        dtype=_dtype(args.dtype, model),
        gpu_memory_utilization=args.gpu_memory_utilization,
        cloud=args.cloud,
        spot=args.spot,
    )


def _dtype(option: str, model: PlannedModel) -> Dtype:
    if option == "auto":
        return "bfloat16" if model.config.dtype == "float32" else model.config.dtype
    return "float16" if option == "float16" else "bfloat16"
