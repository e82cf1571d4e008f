"""The rows of `tramontane bench`."""

from pathlib import Path

from cluster.bench.lengths import parse_lengths
from cluster.bench.objective import parse_objective
from cluster.bench.workload import DEFAULT_WARMUP
from cluster.cli.options.option import Command, Group, option, switch
from cluster.cli.options.rows.shared import API_KEY, CA_CERT, LOG_LEVEL, SET
from cluster.cli.options.values import parse_numbers, parse_positive, parse_rate, parse_seconds, parse_whole
from cluster.config.serve import ServeConfig
from cluster.system.net import url_of

DEFAULT_CONCURRENCY = (1, 8, 32)
DEFAULT_ROUNDS, DEFAULT_COMPARE_ROUNDS = 1, 5
REQUESTS_OF_A_STREAM, MIN_REQUESTS, RATE_SECONDS = 4, 16, 30

BENCH = Command(
    name="bench",
    help="measure how fast a server is under load, or compare two",
    description="Sends streams to an OpenAI-compatible server (Tramontane, vLLM, llama.cpp's) and measures time to first token, gaps "
    "between tokens, end to end, tokens per second, goodput and price. With --compare, two servers take turns. Ctrl-C ends it; what was "
    "measured is kept.",
    run="cluster.cli.bench.main:bench",
    groups=(
        Group(
            "server",
            (
                option("--url", default=url_of(ServeConfig.host, ServeConfig.port), help="address of the server"),
                option(
                    "--model",
                    metavar="NAME",
                    help="the model's name in requests",
                    shown_default="the first of /v1/models",
                ),
                API_KEY,
                option("--compare", metavar="URL", help="a second server, which takes turns with the first"),
                option(
                    "--compare-model",
                    metavar="NAME",
                    help="its model",
                    shown_default="--model, or the first of its /v1/models",
                ),
                option("--compare-api-key", metavar="KEY", help="its API key; it is never sent that of --url"),
                CA_CERT,
                option(
                    "--endpoint",
                    choices=("completions", "chat"),
                    default="completions",
                    help="API path that answers: /v1/completions or /v1/chat/completions",
                ),
                switch("--text", help="send prompts as text even to a server that takes token ids"),
                option(
                    "--vocab-size",
                    parse=parse_positive,
                    metavar="N",
                    help="size of the vocabulary: draws token ids from all but the first eighth of it",
                    shown_default="ids of common words, from the server's /tokenize",
                ),
                SET,
                option(
                    "--timeout",
                    parse=parse_seconds,
                    metavar="S",
                    default=120.0,
                    help="seconds without a byte after which a request has failed",
                ),
            ),
        ),
        Group(
            "load",
            (
                option(
                    "--concurrency",
                    parse=parse_numbers,
                    metavar="N,N",
                    help="a closed loop: so many streams at the same time, each sends its next request when its last one has ended; one "
                    "load after another",
                    shown_default=",".join(map(str, DEFAULT_CONCURRENCY)),
                ),
                option(
                    "--rate",
                    parse=parse_rate,
                    metavar="R",
                    help="instead an open loop: R requests a second on average, at random (Poisson)",
                ),
                option(
                    "--trace",
                    parse=Path,
                    metavar="FILE",
                    help="instead the times and lengths of a trace: Azure's CSV, or Mooncake's JSONL with shared prefixes",
                ),
                option(
                    "--trace-speed",
                    parse=parse_rate,
                    metavar="F",
                    help="with --trace, times as fast",
                    shown_default="1",
                ),
                option(
                    "--max-prompt-tokens",
                    parse=parse_positive,
                    metavar="N",
                    help="with --trace, leave out requests with longer prompts",
                    shown_default="no limit",
                ),
                option(
                    "--prompt-tokens",
                    parse=parse_lengths,
                    metavar="LENGTHS",
                    help="length of prompts: 256, 64-512, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA",
                    shown_default="256; the trace's",
                ),
                option(
                    "--output-tokens",
                    parse=parse_lengths,
                    metavar="LENGTHS",
                    help="length of answers, in the same forms",
                    shown_default="128; the trace's",
                ),
                option(
                    "--shared-prefix",
                    parse=parse_positive,
                    metavar="TOKENS",
                    help="tokens before each prompt that are the same in all of them, as a system prompt is",
                    shown_default="none",
                ),
                option(
                    "--num-prefixes",
                    parse=parse_positive,
                    metavar="N",
                    help="with --shared-prefix, how many different ones there are",
                    shown_default="1",
                ),
                option(
                    "--requests",
                    parse=parse_positive,
                    metavar="N",
                    help="requests of a load",
                    shown_default=f"{REQUESTS_OF_A_STREAM} a stream, at least {MIN_REQUESTS}; {RATE_SECONDS} s of --rate; the whole trace",
                ),
                option(
                    "--duration",
                    parse=parse_seconds,
                    metavar="S",
                    help="send nothing more after S seconds of a load",
                    shown_default="no limit",
                ),
                option(
                    "--warmup",
                    parse=parse_whole,
                    metavar="N",
                    help="requests before each load that do not count",
                    shown_default=f"as many as streams, {DEFAULT_WARMUP} at most",
                ),
                option(
                    "--rounds",
                    parse=parse_positive,
                    metavar="N",
                    help="how often to repeat everything, with other prompts",
                    shown_default=f"{DEFAULT_ROUNDS}; {DEFAULT_COMPARE_ROUNDS} with --compare",
                ),
                option("--seed", parse=parse_whole, metavar="N", default=0, help="the same seed gives the same load"),
            ),
        ),
        Group(
            "results",
            (
                option(
                    "--objective",
                    parse=parse_objective,
                    metavar="LIMITS",
                    help="count requests that meet it as goodput: ttft=500ms,gap=50ms; also max_gap and e2e",
                ),
                option(
                    "--price-per-hour",
                    parse=parse_rate,
                    metavar="USD",
                    help="the server's price, for that of a million tokens",
                ),
                option("--json", parse=Path, metavar="FILE", help="write all numbers to FILE"),
                switch("--all-requests", help="with --json, also every request with the time of each event"),
                option("--html", parse=Path, metavar="FILE", help="write a page with tables and plots to FILE"),
                option(
                    "--plots", parse=Path, metavar="DIR", help="write the plots to DIR as PNG; needs the extra `bench`"
                ),
                LOG_LEVEL,
            ),
        ),
    ),
)
