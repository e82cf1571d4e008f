"""The rows of `tramontane batch run`, `resume`, `status`, `merge` and `cancel`."""

from dataclasses import replace
from pathlib import Path

from cluster.batch.records import ENDPOINTS
from cluster.cli.batch.convert import FORMATS
from cluster.cli.batch.parts.records import parse_part
from cluster.cli.options.option import Command, Group, Option, argument, option, remembered, switch
from cluster.cli.options.rows.shared import (
    API_KEY,
    CA_CERT,
    CHAT_TEMPLATE,
    ENGINE_ROWS,
    GENERATION_CONFIG,
    GGUF_FILE,
    JOIN_RAY,
    JSON,
    LOG_LEVEL,
    REVISION,
    SERVED_NAME,
    SET,
    TENSOR_PARALLEL_SIZE,
)
from cluster.cli.options.values import parse_deadline, parse_positive, parse_replicas

_COMMON = (
    option(
        "--state-dir",
        parse=Path,
        metavar="DIR",
        help="folder that remembers the batch",
        shown_default="OUT.tramontane next to OUT; in XDG_STATE_HOME for object storage",
    ),
    LOG_LEVEL,
)
_SERVER = Group(
    "server",
    (option("--url", metavar="URL", help="a running server, which then answers the lines"), API_KEY, CA_CERT),
)
_CLUSTER: tuple[Option, ...] = (
    JOIN_RAY,
    option(
        "--replicas",
        parse=parse_replicas,
        metavar="N|MIN:MAX",
        help="copies of the model",
        shown_default="1; 0:1 on a Ray cluster that is joined, or 0:N with --max-replicas N",
    ),
    option("--max-replicas", parse=parse_positive, metavar="N", help="most copies of the model for this batch"),
    replace(TENSOR_PARALLEL_SIZE, parse=parse_positive),
)
_DEADLINE = option(
    "--deadline",
    parse=parse_deadline,
    metavar="TIME",
    help="time to finish in, such as 2h: replicas are added to meet it, and lines not answered by then expire",
    shown_default="none; 24h on a server",
)
_TARGET = argument("target", metavar="OUT|ID", help="the output of a batch or, with --url, a batch's id")

RUN = Command(
    name="batch run",
    help="answer the lines of a file; run again, it continues where it stopped",
    description="Answers the lines of a file. Run again with the same options, it continues where it stopped.",
    run="cluster.cli.batch.main:run",
    groups=(
        Group(
            None,
            (
                *_COMMON,
                argument(
                    "source", metavar="IN", help="JSONL, CSV or Parquet: a path, - for stdin, or s3://, gs://, az://"
                ),
                option(
                    "-o",
                    "--output",
                    metavar="OUT",
                    is_required=True,
                    help="file for the answers, as JSONL: a path, - for stdout, or s3://, gs://, az://",
                ),
                option(
                    "--errors",
                    metavar="FILE",
                    help="file for the lines without an answer",
                    shown_default="OUT with .errors before its ending",
                ),
                switch("--overwrite", help="start over, and replace what is in OUT"),
                option(
                    "--part",
                    parse=parse_part,
                    metavar="I/N",
                    help="answer only every N-th line, starting with line I (from 0), into a part of OUT; "
                    "`tramontane batch merge OUT` joins the parts",
                ),
            ),
        ),
        Group(
            "requests",
            (
                option(
                    "--model",
                    metavar="MODEL",
                    help="folder of a checkpoint or its id on the Hugging Face Hub; with --url, a model that the server serves",
                    shown_default="the demo model; with --url, the server's",
                ),
                REVISION,
                GGUF_FILE,
                SERVED_NAME,
                CHAT_TEMPLATE,
                GENERATION_CONFIG,
                option("--format", choices=FORMATS, help="format of IN", shown_default="from the ending of IN"),
                option(
                    "--endpoint",
                    choices=ENDPOINTS,
                    help="API path that answers the lines",
                    shown_default="from the fields of the lines",
                ),
                option(
                    "--column",
                    kind="list",
                    dest="columns",
                    metavar="FIELD=NAME",
                    help="column for a field (prompt, messages or input), or a text with columns in it: 'prompt=Translate: {text}'; "
                    "custom_id=NAME names the lines; may be repeated",
                ),
                option("--max-tokens", parse=int, metavar="N", help="most tokens to generate for a line"),
                option("--temperature", parse=float, metavar="T", help="0 always picks the most likely token"),
                option(
                    "--top-p",
                    parse=float,
                    metavar="P",
                    help="sample only from the most likely tokens whose probabilities add up to P",
                ),
                option(
                    "--seed",
                    parse=int,
                    metavar="N",
                    help="the same seed gives the same text",
                    shown_default="a different one for each line, the same in every run",
                ),
                SET,
            ),
            note="used for lines that do not set these fields themselves",
        ),
        _SERVER,
        Group("cluster", (*_CLUSTER, _DEADLINE), note="used without --url"),
        Group("engine", ENGINE_ROWS, note="used without --url"),
    ),
)

RESUME = Command(
    name="batch resume",
    help="continue a batch that was interrupted; options replace those of `run`",
    description="Continues a batch after any interruption. Options that are given replace those of `batch run`.",
    run="cluster.cli.batch.main:resume",
    groups=(
        Group(
            None,
            (
                *_COMMON,
                argument(
                    "target", metavar="OUT", help="the output of `batch run`, or the folder that remembers the batch"
                ),
            ),
        ),
        _SERVER,
        Group("cluster", remembered(_CLUSTER), note="used without --url"),
        Group("engine", remembered(ENGINE_ROWS), note="used without --url"),
    ),
)

STATUS = Command(
    name="batch status",
    help="show the progress of a batch",
    description="Shows the progress of a batch.",
    run="cluster.cli.batch.main:show_status",
    groups=(Group(None, (*_COMMON, _TARGET, JSON)), _SERVER),
)

MERGE = Command(
    name="batch merge",
    help="join the parts that `run --part` wrote",
    description="Joins the parts that `batch run --part` wrote into one output.",
    run="cluster.cli.batch.main:join_parts",
    groups=(
        Group(
            None,
            (
                *_COMMON,
                argument("target", metavar="OUT", help="the output that `run --part` was given"),
                option(
                    "--errors",
                    metavar="FILE",
                    help="the --errors that `run --part` was given",
                    shown_default="OUT with .errors before its ending",
                ),
                option(
                    "--parts",
                    parse=parse_positive,
                    metavar="N",
                    help="number of parts",
                    shown_default="from the parts' names",
                ),
                switch("--overwrite", help="replace what is in OUT"),
                switch("--remove-parts", help="delete the parts once OUT is complete"),
            ),
        ),
    ),
)

CANCEL = Command(
    name="batch cancel",
    help="cancel a batch and keep the answers it has",
    description="Cancels a batch. The answers it has so far are kept.",
    run="cluster.cli.batch.main:cancel",
    groups=(Group(None, (*_COMMON, _TARGET)), _SERVER),
)

BATCH_COMMANDS = (RUN, RESUME, STATUS, MERGE, CANCEL)
