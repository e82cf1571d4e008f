"""What gateway and rank hold in memory while they are attacked all the time, and after it.

    python benchmarks/soak.py [--seconds 1200] [--idle 30] [--rate 1] [--output benchmarks/results/limits.md]

Starts `tramontane serve` on the demo model, runs attack_mix.py against it, and samples the processes. The KV cache is small (64 MiB), so
that its pages, which a rank takes from the system when it first writes them, are all in use after a minute and do not look like growth.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from attack_mix import PATIENCE_S, AttackMix  # noqa: E402
from sections import write_section  # noqa: E402
from support.servers.system_server import API_KEY, Server  # noqa: E402

KV_CACHE = "64M"
EVERY_S = 5.0
WARM_S = 15.0
NUM_ROWS = 5  # of the table, between the start and the end
HEADING = "## Memory during a soak of attacks"


@dataclass(frozen=True)
class Sample:
    """One process at one time. Bytes; `pss_bytes` counts shared pages in parts."""

    name: str
    at_s: float
    rss_bytes: int
    pss_bytes: int
    num_threads: int
    num_files: int


def sample(processes: dict[str, psutil.Process], at_s: float) -> list[Sample]:
    samples = []
    for name, process in processes.items():
        memory = process.memory_full_info()
        samples.append(Sample(name, at_s, memory.rss, memory.pss, process.num_threads(), process.num_fds()))
    return samples


async def soak(
    url: str, key: str, processes: dict[str, psutil.Process], *, seconds: float, idle_s: float, rate: float
) -> tuple[list[Sample], AttackMix]:
    """Samples before, during and after the attacks. Times count from the start of the attacks."""
    port = int(url.rpartition(":")[2])
    samples = sample(processes, -WARM_S)
    warm = AttackMix(port, key, seed=1)
    await warm.run(WARM_S, rate=rate)  # code and vocabularies are loaded at their first use
    await asyncio.sleep(2)
    mix = AttackMix(port, key, seed=2)
    began = time.monotonic()
    samples += sample(processes, 0.0)
    attacks = asyncio.create_task(mix.run(seconds, rate=rate))
    while not attacks.done():
        await asyncio.wait([attacks], timeout=EVERY_S)
        samples += sample(processes, time.monotonic() - began)
        print(f"{samples[-1].at_s:6.0f} s", *(describe(s) for s in samples[-len(processes) :]), sep="  ", flush=True)
    await attacks
    await asyncio.sleep(idle_s)
    samples += sample(processes, time.monotonic() - began)
    print(" after ", *(describe(s) for s in samples[-len(processes) :]), sep="  ", flush=True)
    return samples, mix


def describe(s: Sample) -> str:
    return f"{s.name}: {s.rss_bytes >> 20} MiB, PSS {s.pss_bytes >> 20}, {s.num_threads} threads, {s.num_files} files"


def table(samples: Sequence[Sample], names: Sequence[str]) -> list[str]:
    """Before the first attack, start, every fifth of the time, end, and after the idle time."""
    times = sorted({s.at_s for s in samples})
    end = times[-2]
    wanted = [times[0], *(min(times[1:-1], key=lambda at: abs(at - end * i / NUM_ROWS)) for i in range(NUM_ROWS + 1))]
    columns = [f"{name}: {what}" for name in names for what in ("RSS, MiB", "PSS, MiB", "threads", "files")]
    rows = [f"| {' | '.join(['seconds', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for at in [*wanted, times[-1]]:
        cells = ["fresh" if at < 0 else "after" if at == times[-1] else f"{at:.0f}"]
        for s in (s for name in names for s in samples if s.at_s == at and s.name == name):
            cells += [str(s.rss_bytes >> 20), str(s.pss_bytes >> 20), str(s.num_threads), str(s.num_files)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def measure(*, seconds: float, idle_s: float, rate: float) -> tuple[list[Sample], AttackMix]:
    """A server's samples, and what was sent to it."""
    server = Server("--kv-cache-memory", KV_CACHE, "--no-batches")
    try:
        server.wait_ready(1)
        (replica,) = server.replicas("ready")
        processes = {"gateway": psutil.Process(server.process.pid), "rank 0": server.rank(replica, 0)}
        return asyncio.run(soak(server.url, API_KEY, processes, seconds=seconds, idle_s=idle_s, rate=rate))
    finally:
        server.kill()


def run(*, seconds: float, idle_s: float, rate: float) -> list[str]:
    """The section of limits.md."""
    samples, mix = measure(seconds=seconds, idle_s=idle_s, rate=rate)
    counts = ", ".join(
        f"{counter.total():,} {kind} ({counter['none']:,} without an answer in {PATIENCE_S:g} s)"
        if counter["none"]
        else f"{counter.total():,} {kind}"
        for kind, counter in mix.statuses.items()
    )
    print({kind: dict(counter) for kind, counter in mix.statuses.items()})
    return [
        HEADING,
        "",
        f"`python benchmarks/soak.py --seconds {seconds:g} --rate {rate:g}`, {time.strftime('%F')}: `tramontane serve` on the demo model",
        f"with a KV cache of {KV_CACHE}, after {WARM_S:g} s of the same attacks to load what is loaded at its first use. Sent:",
        f"{counts}.",
        f'"fresh" is before the first attack, "after" is {idle_s:g} s after the last one. PSS counts pages that processes share in parts.',
        "",
        *table(samples, ["gateway", "rank 0"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0, help="of the attacks")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds between the last attack and the last sample")
    parser.add_argument("--rate", type=float, default=1.0, help="times the rates of attack_mix.py")
    parser.add_argument("--output", type=Path, default=None, help="write the section to this file")
    args = parser.parse_args()
    section = run(seconds=args.seconds, idle_s=args.idle, rate=args.rate)
    print("\n".join(section))
    if args.output:
        write_section(args.output, section)


if __name__ == "__main__":
    main()
