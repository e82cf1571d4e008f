"""The rows of `tramontane generate`."""

from cluster.cli.options.option import Command, Group, option
from cluster.cli.options.rows.adapters import GENERATE_ADAPTERS
from cluster.cli.options.rows.profile import PROFILE
from cluster.cli.options.rows.shared import ENGINE, GGUF_FILE, LOG_LEVEL, MODEL, REVISION

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
