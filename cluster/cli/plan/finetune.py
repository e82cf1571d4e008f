"""`tramontane plan --finetune`: what it prints. Needs no GPU and no cloud account."""

import json
from argparse import Namespace

from rich.text import Text

from cluster.cli.options.rows.check import DEFAULT_BATCH_SIZE, DEFAULT_RANK, DEFAULT_TRAINING_CONTEXT, PLAN
from cluster.plan.catalog import known_offers
from cluster.plan.finetune.memory import Training
from cluster.plan.finetune.planner import FORMS, finetune_refusal, make_finetune_plans
from cluster.plan.finetune.report import command, finetune_json, finetune_report
from cluster.plan.gpus import GPUS, find_gpu
from cluster.plan.models import describe_model
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError

READS = (
    "model", "revision", "gguf_file", "log_level", "context", "gpu", "cloud", "spot", "quantization", "finetune", "rank", "batch_size",
    "json",
)  # fmt: skip


def plan_finetune(args: Namespace) -> None:
    """Prints the plans. Raises ConfigError for invalid options, and if nothing fits."""
    for row in PLAN.options:
        if row.dest not in READS and getattr(args, row.dest) != row.default:
            raise ConfigError(
                f"{row.names[0]} has no effect with --finetune.", remedy="Leave it out.", param=row.names[0]
            )
    if args.quantization == "fp8":
        raise ConfigError(
            "--quantization fp8 is not a form of examples/finetune.", remedy="Use int8 or int4.", param="--quantization"
        )
    model = describe_model(args.model, revision=args.revision, gguf_file=args.gguf_file)
    training = Training(
        rank=args.rank or DEFAULT_RANK,
        batch_size=args.batch_size or DEFAULT_BATCH_SIZE,
        max_length=args.context or min(DEFAULT_TRAINING_CONTEXT, model.config.max_position_embeddings),
    )
    if not 2 <= training.max_length <= model.config.max_position_embeddings:
        raise ConfigError(
            f"--context {training.max_length} does not work with {args.model}.",
            remedy=f"Use 2 to {model.config.max_position_embeddings} tokens.",
            param="--context",
        )
    plans = make_finetune_plans(
        model,
        training,
        gpus=tuple(GPUS.values()) if args.gpu is None else (find_gpu(args.gpu),),
        forms=FORMS if args.quantization is None else (None if args.quantization == "none" else args.quantization,),
        offers=known_offers(),
        cloud=args.cloud,
        spot=args.spot,
    )
    if args.json:
        print(json.dumps(finetune_json(model, training, plans), indent=2))
    else:
        console = answer_console()
        console.print(finetune_report(model, training, plans))
        if plans[0].fits:
            # In one line however narrow the terminal is, so that it can be copied.
            console.print(Text(f"\n{command(model, training, plans[0])}"), soft_wrap=True)
    if not plans[0].fits:
        raise finetune_refusal(model, training, plans)
