"""Results as JSON: everything the tables show, every round, and on request every request. The form is described in docs/bench.md."""

from typing import Any

import msgspec

from cluster.bench.exchange import Outcome
from cluster.bench.load import Loaded
from cluster.bench.report.results import Results, Row
from cluster.bench.statistics import METRICS, Spread, Summary

FORM = 1  # changes when a reader would have to change


def as_json(results: Results, *, with_requests: bool = False) -> bytes:
    """with_requests: also each request with the time of every event."""
    plan = results.plan
    document: dict[str, Any] = {
        "form": FORM,
        "began": results.began,
        "command": results.command,
        "complete": results.is_whole,
        "seed": plan.seed,
        "rounds": plan.num_rounds,
        "prompt_tokens": plan.shape.prompt.text,
        "output_tokens": plan.shape.output.text,
        "shared_prefix": plan.shape.shared_prefix,
        "objective": None if results.objective is None else results.objective.text,
        "price_per_hour": results.price_per_hour,
        "servers": [
            {"url": s.name, "model": s.model, "endpoint": s.endpoint, "prompts": _prompts(s.prompts.token_ids)}
            for s in results.servers
        ],
        "units": {name: metric.unit for name, metric in METRICS.items()},
        "levels": [_row(row, with_requests=with_requests) for row in results.rows],
        "ratios": [{"level": c.label, "metrics": _spreads(c.ratios)} for c in results.comparisons],
        "remarks": list(results.remarks),
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1)


def _prompts(token_ids: tuple[int, ...] | None) -> str:
    return "text" if token_ids is None else "token ids"


def _row(row: Row, *, with_requests: bool) -> dict[str, Any]:
    rounds = [_round(s, load, with_requests=with_requests) for s, load in zip(row.runs, row.loads, strict=True)]
    return {
        "level": row.label,
        "server": row.server_index,
        "ok": row.num_ok,
        "failed": row.num_failed,
        "problems": row.problems,
        "metrics": _spreads(row.metrics),
        "rounds": rounds,
    }


def _round(summary: Summary, load: Loaded, *, with_requests: bool) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(summary)
    if with_requests:
        found["requests"] = [_request(o, load.began_s) for o in load.outcomes]
    return found


def _request(outcome: Outcome, began_s: float) -> dict[str, Any]:
    """Seconds after the load began."""
    return {
        "asked_s": outcome.asked_s - began_s,
        "sent_s": outcome.sent_s - began_s,
        "events_s": [t - began_s for t in outcome.times_s],
        "ended_s": outcome.ended_s - began_s,
        "prompt_tokens": outcome.num_prompt,
        "output_tokens": outcome.num_output,
        "failure": outcome.failure,
    }


def _spreads(found: dict[str, Spread]) -> dict[str, Any]:
    return {name: {"median": s.median, "low": s.low, "high": s.high} for name, s in found.items()}
