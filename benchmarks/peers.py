"""Tramontane next to vLLM and llama.cpp: the same weights on the same machine, alternating, in several rounds.

    python benchmarks/peers.py [--parts decode,http] [--engines ours,vllm] [--formats bfloat16,int8] [--rounds 3]
                               [--output benchmarks/results/peers.md]

Each run adds its rounds to a JSON file, and writes the page from all rounds in it. So one part and one round at a time also works, and
`--rounds 0` only writes the page again. `--fresh` forgets earlier rounds of what it measures. See benchmarks/README.md.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from comparison.models import NAMES, checkpoint  # noqa: E402
from comparison.parts import PARTS, Context, machine_limits  # noqa: E402
from comparison.processes import MeasurementError  # noqa: E402
from comparison.report import page  # noqa: E402
from comparison.results import MACHINE, Results  # noqa: E402
from comparison.subjects import subjects  # noqa: E402

CACHE = Path("~/.cache/tramontane/peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all of %(default)s")
    parser.add_argument("--engines", default="ours,vllm,llama.cpp")
    parser.add_argument("--formats", default="float32,bfloat16,int8,int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of a measurement within one process; their median counts"
    )
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--llama-python", type=Path, default=ROOT / ".venv-llama" / "bin" / "python")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the models, 3 GB (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rounds of what is measured now")
    parser.add_argument("--output", type=Path, default=None, help="write the page to this file")
    args = parser.parse_args()
    parts, engines, formats = args.parts.split(","), args.engines.split(","), args.formats.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts does not know {', '.join(sorted(unknown))}. Use some of {', '.join(PARTS)}.")
    everyone = subjects(vllm=args.vllm_python, llama=args.llama_python)
    chosen = [s for s in everyone if s.engine in engines and s.number_format in formats]
    cache = args.cache.expanduser()
    results = Results(args.data)
    if args.rounds:
        for name in NAMES:
            checkpoint(name, cache)
    if args.fresh:
        results.remove(parts, [s.name for s in chosen])
    for number in range(args.rounds):
        context = Context(cache=cache, repeats=args.repeats, round_number=number)
        load = os.getloadavg()[0]
        limits = machine_limits(context)
        results.add(MACHINE, MACHINE, note=limits.pop("description"), metrics=limits | {"load": load})
        for part in (PARTS[name] for name in parts):
            for subject in (s for s in chosen if part.includes(s)):
                print(f"round {number + 1}: {part.name}, {subject.name} ", end="", flush=True)
                try:
                    metrics = part.measure(subject, context)
                except (MeasurementError, RuntimeError, OSError) as error:
                    results.add(part.name, subject.name, error=str(error))
                    print(f"{error}", flush=True)
                else:
                    results.add(part.name, subject.name, metrics=metrics)
                    print({key: round(value, 2) for key, value in metrics.items()}, flush=True)
    text = page(results, everyone)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
