"""The row of `tramontane eval`."""

from pathlib import Path

from cluster.cli.options.option import Command, Group, argument, option
from cluster.cli.options.rows.shared import API_KEY, CA_CERT, LOG_LEVEL, SET
from cluster.cli.options.values import parse_positive, parse_rate, parse_seconds, parse_whole
from cluster.config.serve import ServeConfig
from cluster.eval.suite import built_in_names
from cluster.system.net import url_of

EVAL = Command(
    name="eval",
    help="measure how well a model answers, alone or against a baseline",
    description="Asks a model on an OpenAI-compatible server the questions of some suites, checks the answers, and prints the share that "
    "is right in each suite with its 95 % interval, the cost and the speed. With --baseline, both models get the same questions, and the "
    "difference is tested. Answers are kept as they come: after any interruption, the same command goes on. With --report it puts "
    "results together in one table of models.",
    run="cluster.cli.eval.main:evaluate_command",
    groups=(
        Group(
            None,
            (
                argument(
                    "suites",
                    metavar="SUITE,SUITE",
                    is_optional=True,
                    help=f"{', '.join(built_in_names())}; paths of YAML or JSONL files; lm-eval:TASK, a task, a group or the path of a "
                    "task of EleutherAI's lm-eval",
                    shown_default="all that are built in",
                ),
            ),
        ),
        Group(
            "models",
            (
                option("--url", default=url_of(ServeConfig.host, ServeConfig.port), help="address of the server"),
                option("--model", metavar="NAME", help="the model", shown_default="the first of /v1/models"),
                option("--baseline", metavar="NAME", help="a second model, to compare with"),
                option("--baseline-url", metavar="URL", help="its server", shown_default="--url"),
                option("--judge", metavar="NAME", help="the model that decides items with the check `judge`"),
                option("--judge-url", metavar="URL", help="its server", shown_default="--url"),
                API_KEY,
                CA_CERT,
                option(
                    "--endpoint",
                    choices=("chat", "completions"),
                    default="chat",
                    help="completions: for models without a chat template",
                ),
                SET,
                option(
                    "--timeout",
                    parse=parse_seconds,
                    metavar="S",
                    default=120.0,
                    help="seconds without a byte after which a request has failed",
                ),
                option(
                    "--patience",
                    parse=parse_seconds,
                    metavar="S",
                    default=60.0,
                    help="seconds for which a request is sent again to a server that is busy or gone",
                ),
                option("--concurrency", parse=parse_positive, metavar="N", default=8, help="requests at the same time"),
                option(
                    "--max-items", parse=parse_positive, metavar="N", help="ask only the first N items of each suite"
                ),
            ),
        ),
        Group(
            "tasks of lm-eval",
            (
                option(
                    "--num-fewshot",
                    parse=parse_whole,
                    metavar="N",
                    help="examples before each question",
                    shown_default="the task's number",
                ),
                option(
                    "--metric",
                    metavar="NAME",
                    help="the metric that counts, as lm-eval writes it: acc_norm, or exact_match,flexible-extract",
                    shown_default="the task's first",
                ),
            ),
        ),
        Group(
            "results",
            (
                option(
                    "--output",
                    parse=Path,
                    metavar="DIR",
                    help="folder of the answers and of report.json and report.html",
                    shown_default="eval-MODEL",
                ),
                option("--price-prompt", parse=parse_rate, metavar="USD", help="price of a million tokens of prompts"),
                option("--price-output", parse=parse_rate, metavar="USD", help="price of a million tokens of answers"),
                LOG_LEVEL,
            ),
        ),
        Group(
            "table of models",
            (
                option(
                    "--report",
                    kind="list",
                    metavar="[NAME=]DIR",
                    help="ask nothing; print the table of the results in these folders, as Markdown; may be repeated; with --output also "
                    "write table.md, table.json and table.html",
                ),
                option(
                    "--bench",
                    kind="list",
                    metavar="[NAME=]FILE",
                    help="with --report, the JSON of `tramontane bench`, whose speed stands in the row of its model; may be repeated",
                ),
                option(
                    "--price-per-hour",
                    parse=parse_rate,
                    metavar="USD",
                    help="with --report, price of the machine, from which the cost at the measured speed follows",
                ),
            ),
        ),
    ),
)
# What --report reads; it refuses every other option.
TABLE_OPTIONS = ("report", "bench", "price_per_hour", "output", "price_prompt", "price_output", "log_level")
