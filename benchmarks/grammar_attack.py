"""What a plain stream and a plain `json_object` request notice of 63 sequences with an ambiguous grammar on the same replica.

    python benchmarks/grammar_attack.py [--seconds 8] [--rounds 5] [--threads 2] [--output benchmarks/results/limits.md]

The demo model's engine in one process, without HTTP: the engine's own thread, and this one as the client. The attackers' grammar has as
many readings as the parser's limits allow; as soon as one of their requests ends, the next one starts. For comparison, 63 sequences
without a grammar. The three take turns, and ratios are of the same round, so that other load on the machine cancels out.
"""

import argparse
import itertools
import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import machine
import torch
from sections import write_section

from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.device.cpu import usable_cores
from workers.engine.llm_engine import LLMEngine
from workers.engine.loop import EngineLoop
from workers.protocol import GenerateRequest, SamplingParams, TokenDelta

HEADING = "## A plain stream next to ambiguous grammars"
DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
NUM_NEIGHBOURS = 63
FIRST_S = 1.0
FREE = '%llguidance {"no_forcing": true}\n'
ATTACK = FREE + "start: s\ns: s s | " + " | ".join(f"x{i}" for i in range(60)) + "\n"
ATTACK += "\n".join(f"x{i}: /[a-z {i % 10}]/" for i in range(60))
JSON = '{"grammars": [{"json_schema": {"type": "object", "x-guidance": {"whitespace_pattern": " |\\\\n {0,32}"}}}]}'
# Neighbours by name: their grammar, or None where there are no neighbours.
SCENES: dict[str, tuple[int, str | None]] = {
    "alone": (0, None),
    f"{NUM_NEIGHBOURS} without a grammar": (NUM_NEIGHBOURS, None),
    f"{NUM_NEIGHBOURS} ambiguous grammars": (NUM_NEIGHBOURS, ATTACK),
}


@dataclass(frozen=True)
class Measured:
    """Seconds between tokens of the plain stream, in the first second and later; seconds to the first token of each `json_object`
    request; and the tokens that the neighbours got.
    """

    first_gaps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    neighbour_tokens: list[int] = field(default_factory=list)


class Client:
    def __init__(self, num_threads: int | None) -> None:
        model = load_model_config(DEMO)
        config = EngineConfig(
            model_path=str(DEMO), model=model, tokenizer_path=str(DEMO / "tokenizer.model.v3"), max_model_len=1024,
            num_kv_blocks=8000, max_num_seqs=128, num_threads=num_threads,
        )  # fmt: skip
        self._deltas: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        self._core = LLMEngine(config).core
        self._loop = EngineLoop(self._core, self._publish)
        self._loop.start()
        self._names = itertools.count()

    def measure(self, scene: str, *, seconds: float) -> Measured:
        number, grammar = SCENES[scene]
        measured = Measured()
        begun = time.monotonic()
        neighbours = {self._submit(grammar, seed=i) for i in range(number)}
        stream, last = self._submit(None, ignore_eos=True), None
        json_request, asked = self._submit(JSON, max_tokens=8), time.monotonic()
        waits_for_json = True
        while time.monotonic() < begun + seconds:
            delta = self._deltas.get(timeout=30)
            now, has_ended = time.monotonic(), delta.finish_reason is not None
            if delta.request_id == stream:
                if last is not None:
                    (measured.gaps if now > begun + FIRST_S else measured.first_gaps).append(now - last)
                last = now
                if has_ended:
                    stream, last = self._submit(None, ignore_eos=True), None
            elif delta.request_id == json_request:
                if waits_for_json:
                    measured.ttft.append(now - asked)
                    waits_for_json = False
                if has_ended:
                    json_request, asked, waits_for_json = self._submit(JSON, max_tokens=8), now, True
            elif delta.request_id in neighbours:
                measured.neighbour_tokens.append(len(delta.token_ids))
                if has_ended:
                    neighbours.remove(delta.request_id)
                    neighbours.add(self._submit(grammar, seed=len(measured.neighbour_tokens)))
        for name in (*neighbours, stream, json_request):
            self._loop.abort(name)
        while self._core.num_requests:
            time.sleep(0.01)
        return measured

    def close(self) -> None:
        self._loop.stop()

    def _publish(self, deltas: list[TokenDelta], _: object) -> None:
        for delta in deltas:
            self._deltas.put(delta)

    def _submit(self, grammar: str | None, **params: object) -> str:
        name = str(next(self._names))
        fields = {"max_tokens": 900, "seed": 1, "grammar": grammar, **params}
        sampling = SamplingParams(**fields)  # type: ignore[arg-type]
        self._loop.submit(GenerateRequest(request_id=name, prompt_token_ids=[1, 500, 600, 700], sampling=sampling))
        return name


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def row(scene: str, rounds: Sequence[dict[str, Measured]], seconds: float) -> str:
    def ratio(share: float) -> str:
        ratios = [quantile(r[scene].gaps, share) / quantile(r["alone"].gaps, share) for r in rounds]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    gaps = [1e3 * gap for r in rounds for gap in r[scene].gaps]
    ttft = [1e3 * value for r in rounds for value in r[scene].ttft]
    tokens_per_s = sum(sum(r[scene].neighbour_tokens) for r in rounds) / (seconds * len(rounds))
    longest = max(gaps + [1e3 * gap for r in rounds for gap in r[scene].first_gaps])
    columns = [
        scene,
        f"{quantile(gaps, 0.5):.1f} / {quantile(gaps, 0.99):.1f} / {longest:.1f}",
        ratio(0.5),
        ratio(0.99),
        " / ".join(f"{quantile(ttft, share):.0f}" for share in (0.5, 0.99, 1.0)),
        f"{tokens_per_s:.0f}",
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, three in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of torch; the default is that of serve, all cores")
    parser.add_argument("--output", type=Path, default=None, help="write the section to this file")
    args = parser.parse_args()
    client = Client(args.threads)
    for scene in SCENES:  # loads what is loaded at its first use
        client.measure(scene, seconds=2)
    rounds = [{scene: client.measure(scene, seconds=args.seconds) for scene in SCENES} for _ in range(args.rounds)]
    client.close()
    section = [
        HEADING,
        "",
        f"`python benchmarks/grammar_attack.py --seconds {args.seconds:g} --rounds {args.rounds}`, {time.strftime('%F')}: "
        f"{machine.describe(torch.device('cpu')).rpartition(', ')[0]}, {args.threads or usable_cores()} torch threads;",
        "the demo model's engine in one process. A grammar that reaches the parser's limits takes 2 to 30 ms of CPU time for each mask;",
        "its request ends after some 14 tokens, and the next one starts at once. p50 and p99 leave out the first second, in which all",
        "neighbours start. Ratios to alone are the median of the rounds, and their range.",
        "",
        "| neighbours | gap between tokens p50 / p99 / max, ms | gap p50 to alone | gap p99 to alone "
        "| first token of `json_object` p50 / p99 / max, ms | neighbours' tokens/s |",
        "|---|---|---|---|---|---|",
        *(row(scene, rounds, args.seconds) for scene in SCENES),
    ]
    print("\n".join(section))
    if args.output:
        write_section(args.output, section)


if __name__ == "__main__":
    main()
