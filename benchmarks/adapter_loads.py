"""What clients of a real server see while an adapter loads: the longest gap between tokens of 8 running streams.

    python benchmarks/adapter_loads.py [MODEL_FOLDER] [--dtype bfloat16] [--streams 8] [--rank 16] [--loads 12] [--output FILE]

Starts `tramontane serve --enable-lora` and one client on bare sockets, which share the cores. Streams are long: none begins or ends near
a load. Each load is compared with as much time before and after it: its longest gap over the median gap of that time. The target is
a median of at most 2 over all loads; the longest gap of the quiet time, over the same median, says how quiet the machine was.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402
import machine  # noqa: E402
import torch  # noqa: E402
from adapters import TARGET_STEP, write_adapter  # noqa: E402
from comparison import http_load, models, processes  # noqa: E402

from workers.checkpoint.model_config import load_model_config  # noqa: E402

NUM_PROMPT = 64
MAX_TOKENS = 1_800  # of a stream
TOKENS_AROUND = 16  # of each stream, before and after a load
MAX_LOADS = 12  # of one set of streams


@dataclass(frozen=True)
class Load:
    """Seconds."""

    load: float
    beside: list[float]
    quiet: list[float]

    @property
    def gap(self) -> float:
        return statistics.median(self.quiet)


async def measure(port: int, folders: list[Path], args: argparse.Namespace, *, vocab_size: int) -> list[Load]:
    streams = [http_load.Stream(0.0) for _ in range(args.streams)]
    found = []

    async def post(session: aiohttp.ClientSession, path: str, body: dict[str, str]) -> None:
        async with session.post(f"http://127.0.0.1:{port}/v1/{path}", json=body) as answer:
            if answer.status != 200:
                raise SystemExit(f"{path}: status {answer.status}: {await answer.text()}")

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                http_load.read_stream(
                    port,
                    http_load.prompt(NUM_PROMPT, vocab_size=vocab_size, seed=i),
                    max_tokens=MAX_TOKENS,
                    seen=seen,
                )
            )
            for i, seen in enumerate(streams)
        ]
        await http_load.until_tokens(streams, tasks, TOKENS_AROUND, more=True)
        for i in range(args.loads):
            quiet_s = time.perf_counter()
            await http_load.until_tokens(streams, tasks, TOKENS_AROUND, more=True)
            began_s = time.perf_counter()
            await post(session, "load_lora_adapter", {"lora_name": f"a{i}", "lora_path": str(folders[i])})
            ended_s = time.perf_counter()
            # The gap that is open when the load ends belongs to it.
            await http_load.until_tokens(streams, tasks, 1, more=True)
            after_s = time.perf_counter()
            await http_load.until_tokens(streams, tasks, TOKENS_AROUND, more=True)
            until_s = time.perf_counter()
            beside = [gap for s in streams for gap in s.gaps_s(began_s, after_s)]
            quiet = [
                gap for s in streams for part in ((quiet_s, began_s), (after_s, until_s)) for gap in s.gaps_s(*part)
            ]
            found.append(Load(ended_s - began_s, beside, quiet))
            await post(session, "unload_lora_adapter", {"lora_name": f"a{i}"})
        for task in tasks:
            task.cancel()
    return found


def paragraph(loads: list[Load], args: argparse.Namespace) -> str:
    median = statistics.median
    longest = [max(one.beside) / one.gap for one in loads]
    quiet = [max(one.quiet) / one.gap for one in loads]
    return (
        f"While an adapter loads over HTTP ({median(one.load for one in loads) * 1000:.0f} ms), the median gap between tokens at a client "
        f"of {args.streams} streams is {median(median(one.beside) / one.gap for one in loads):.2f} times that without a load "
        f"({median(one.gap for one in loads) * 1000:.1f} ms). The longest gap beside a load is {median(longest):.2f} times that "
        f"(target: {TARGET_STEP:g}; {max(longest):.2f} at the worst of {len(loads)} loads, {sum(x <= TARGET_STEP for x in longest)} within "
        f"the target), and of the quiet time around it {median(quiet):.2f} times ({max(quiet):.2f} at the worst)."
    )


async def run(args: argparse.Namespace) -> list[Load]:
    port, model = processes.free_port(), load_model_config(args.model)
    with tempfile.TemporaryDirectory() as root:
        folders = [write_adapter(Path(root, str(i)), model, seed=i, rank=args.rank) for i in range(args.loads)]
        command = [sys.executable, "-m", "cluster.cli.main", "serve", str(args.model), "--port", str(port)]
        command += ["--served-model-name", http_load.MODEL, "--dtype", args.dtype, "--max-num-seqs", str(args.streams)]
        command += ["--enable-lora", "--max-lora-rank", str(args.rank), "--max-model-len", "2048", "--no-batches"]
        serving = processes.serving(command, port=port, environment=os.environ, log=Path(root, "server.log"))
        async with serving:
            vocab_size = models.vocab_size(args.model)
            await http_load.load(
                port, num_streams=args.streams, num_prompt=NUM_PROMPT, num_output=8, vocab_size=vocab_size, seed=99
            )
            return await measure(port, folders, args, vocab_size=vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache/tramontane/peers/mistral-285m"  # as `benchmarks/peers.py` makes it
    parser.add_argument("model", type=Path, nargs="?", default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loads", type=int, default=MAX_LOADS)
    parser.add_argument("--output", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    text = paragraph(asyncio.run(run(args)), args)
    text += f" {machine.describe(torch.device('cpu'))}, `benchmarks/adapter_loads.py`, {time.strftime('%F')}."
    print(text)
    if args.output:
        with args.output.open("a") as file:
            file.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
