"""What a plain stream and a plain `json_object` request notice of 63 sequences with an ambiguous grammar on the same replica.

    python benchmarks/grammar_attack.py [--seconds 10] [--output benchmarks/grammar_attack.md]

The demo model's engine in one process, without HTTP: the engine's own thread, and this one as the client. The attackers' grammar has as
many readings as the parser's limits allow; as soon as one of their requests ends, the next one starts.
"""

import argparse
import itertools
import queue
import statistics
import time
from pathlib import Path

import machine
import torch

from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.engine.llm_engine import LLMEngine
from workers.engine.loop import EngineLoop
from workers.protocol import GenerateRequest, SamplingParams, TokenDelta

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
NUM_ATTACKERS = 63
FREE = '%llguidance {"no_forcing": true}\n'
ATTACK = FREE + "start: s\ns: s s | " + " | ".join(f"x{i}" for i in range(60)) + "\n"
ATTACK += "\n".join(f"x{i}: /[a-z {i % 10}]/" for i in range(60))
JSON = '{"grammars": [{"json_schema": {"type": "object", "x-guidance": {"whitespace_pattern": " |\\\\n {0,32}"}}}]}'


class Client:
    def __init__(self) -> None:
        model = load_model_config(DEMO)
        config = EngineConfig(
            model_path=str(DEMO), model=model, tokenizer_path=str(DEMO / "tokenizer.model.v3"), max_model_len=1024,
            num_kv_blocks=8000, max_num_seqs=128, num_threads=1,
        )  # fmt: skip
        self.deltas: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        self.loop = EngineLoop(LLMEngine(config).core, lambda deltas, _: [self.deltas.put(d) for d in deltas])  # type: ignore[func-returns-value]
        self.loop.start()
        self._names = itertools.count()

    def submit(self, kind: str, grammar: str | None, **params: object) -> str:
        name = f"{kind} {next(self._names)}"
        fields = {"max_tokens": 900, "seed": 1, "grammar": grammar, **params}
        sampling = SamplingParams(**fields)  # type: ignore[arg-type]
        self.loop.submit(GenerateRequest(request_id=name, prompt_token_ids=[1, 500, 600, 700], sampling=sampling))
        return name

    def measure(self, *, seconds: float, attack: bool) -> tuple[list[float], list[float], int]:
        """Gaps of the stream, times to first token of the JSON requests, and how many requests of the attackers ended."""
        gaps, ttft, ended = [], [], 0
        until = time.monotonic() + seconds
        attackers = {self.submit("attack", ATTACK, seed=i) for i in range(NUM_ATTACKERS)} if attack else set()
        stream, last = self.submit("stream", None, ignore_eos=True), None
        json_request, asked = self.submit("json", JSON, max_tokens=8), time.monotonic()
        waits_for_json = True
        while time.monotonic() < until:
            delta = self.deltas.get(timeout=30)
            now = time.monotonic()
            if delta.request_id == stream:
                if last is not None:
                    gaps.append(now - last)
                last = now
                if delta.finish_reason is not None:
                    stream, last = self.submit("stream", None, ignore_eos=True), None
            elif delta.request_id == json_request:
                if waits_for_json:
                    ttft.append(now - asked)
                    waits_for_json = False
                if delta.finish_reason is not None:
                    json_request, asked, waits_for_json = self.submit("json", JSON, max_tokens=8), now, True
            elif delta.request_id in attackers and delta.finish_reason is not None:
                ended += 1
                attackers.remove(delta.request_id)
                attackers.add(self.submit("attack", ATTACK, seed=ended))
        for name in (*attackers, stream, json_request):
            self.loop.abort(name)
        return gaps, ttft, ended


def row(name: str, gaps: list[float], ttft: list[float], ended: int) -> str:
    def both(values: list[float]) -> str:
        values = sorted(values)
        return f"{1e3 * statistics.median(values):.0f} / {1e3 * values[int(0.99 * (len(values) - 1))]:.0f} / {1e3 * values[-1]:.0f}"

    return f"| {name} | {both(gaps)} | {both(ttft)} | {ended} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file")
    args = parser.parse_args()
    client = Client()
    client.measure(seconds=2, attack=False)
    rows = [
        row(name, *client.measure(seconds=args.seconds, attack=attack))
        for name, attack in (("alone", False), (f"{NUM_ATTACKERS} ambiguous grammars", True), ("alone again", False))
    ]
    client.loop.stop()
    lines = [
        "# A plain stream beside ambiguous grammars",
        "",
        f"{machine.describe(torch.device('cpu'))}; the demo model's engine in one process. Times in ms.",
        f"`python benchmarks/grammar_attack.py`, {time.strftime('%F')}.",
        "",
        "| neighbours | gap between tokens p50 / p99 / max | first token of `json_object` p50 / p99 / max | neighbours' requests ended |",
        "|---|---|---|---|",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
