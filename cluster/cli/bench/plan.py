"""From the options of `tramontane bench` to a plan: levels, lengths, rounds. Reads the trace; talks to no server."""

from argparse import Namespace
from dataclasses import replace

from cluster.bench.lengths import parse_lengths
from cluster.bench.rounds import Plan
from cluster.bench.trace import TraceRow, read_trace
from cluster.bench.workload import Level, Shape, closed_level, poisson_level, trace_level
from cluster.cli.options.rows.bench import (
    DEFAULT_COMPARE_ROUNDS,
    DEFAULT_CONCURRENCY,
    DEFAULT_ROUNDS,
    MIN_REQUESTS,
    RATE_SECONDS,
    REQUESTS_OF_A_STREAM,
)
from workers.errors import ConfigError

DEFAULT_PROMPT, DEFAULT_OUTPUT = "256", "128"
_LOADS = ("concurrency", "rate", "trace")
# Option -> what it needs, by the names of their values.
_NEEDS = {
    "trace_speed": "trace",
    "max_prompt_tokens": "trace",
    "num_prefixes": "shared_prefix",
    "compare_model": "compare",
    "compare_api_key": "compare",
}


def plan_of(args: Namespace) -> Plan:
    """Raises ConfigError."""
    _check(args)
    rounds = args.rounds or (DEFAULT_ROUNDS if args.compare is None else DEFAULT_COMPARE_ROUNDS)
    shape = Shape(
        prompt=args.prompt_tokens or parse_lengths(DEFAULT_PROMPT),
        output=args.output_tokens or parse_lengths(DEFAULT_OUTPUT),
        shared_prefix=args.shared_prefix or 0,
        num_prefixes=args.num_prefixes or 1,
    )
    return Plan(
        levels=_levels(args),
        shape=shape,
        num_rounds=rounds,
        seed=args.seed,
        num_warmup=args.warmup,
        limit_s=args.duration,
    )


def _levels(args: Namespace) -> list[Level]:
    if args.trace is not None:
        return [trace_level(_rows(args), name=args.trace.stem, speed=args.trace_speed or 1.0)]
    if args.rate is not None:
        return [poisson_level(args.rate, num_requests=args.requests or max(1, round(args.rate * RATE_SECONDS)))]
    return [
        closed_level(num, num_requests=args.requests or max(MIN_REQUESTS, num * REQUESTS_OF_A_STREAM))
        for num in args.concurrency or DEFAULT_CONCURRENCY
    ]


def _rows(args: Namespace) -> list[TraceRow]:
    """Those that are sent; the first one at 0."""
    rows = read_trace(args.trace)
    longest = args.max_prompt_tokens
    fitting = [row for row in rows if longest is None or row.num_prompt <= longest][: args.requests]
    if not fitting:
        raise ConfigError(
            f"--max-prompt-tokens {longest} leaves no request of the trace.",
            remedy=f"Use at least {min(row.num_prompt for row in rows)}.",
            param="--max-prompt-tokens",
        )
    return [replace(row, at_s=row.at_s - fitting[0].at_s) for row in fitting]


def _check(args: Namespace) -> None:
    """No option is without effect in silence."""
    loads = [name for name in _LOADS if getattr(args, name) is not None]
    if len(loads) > 1:
        raise ConfigError(
            f"{' and '.join(map(_flag, loads))} are different loads.", remedy="Give one of them.", param=_flag(loads[1])
        )
    for name, needed in _NEEDS.items():
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise ConfigError(
                f"{_flag(name)} has no effect without {_flag(needed)}.",
                remedy=f"Add {_flag(needed)}.",
                param=_flag(name),
            )
    for name in ("prompt_tokens", "output_tokens", "shared_prefix"):
        if args.trace is not None and getattr(args, name) is not None:
            raise ConfigError(
                f"{_flag(name)} has no effect with --trace, which has its own lengths.",
                remedy="Leave it out.",
                param=_flag(name),
            )
    if args.vocab_size is not None and (args.text or args.endpoint == "chat"):
        raise ConfigError(
            "--vocab-size has no effect on prompts that are text.", remedy="Leave it out.", param="--vocab-size"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
