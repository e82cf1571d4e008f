"""The table of models in the README: the demo model, and SmolLM2 135M in float32, int8 and int4, with and without an adapter.

    make smollm2
    python benchmarks/models_table.py [--models demo,float32,int8,int4] [--adapter FOLDER] [--page benchmarks/results/models.md]

Serves one model after another, asks it the built-in suites with `tramontane eval`, measures its speed with `tramontane bench`, and puts
them together with `tramontane eval --report`. What is in the output folder is not measured again, so an interruption loses nothing. The
plain weights of SmolLM2 are those of its GGUF file, which rounds them to 4 bits; int8 and int4 round these once more.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import machine  # noqa: E402
import torch  # noqa: E402
from bench_agreement import free_port  # noqa: E402

GGUF = Path.home() / ".cache/tramontane/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BENCH = ("--concurrency", "1,8", "--prompt-tokens", "64", "--output-tokens", "32", "--requests", "24")
PRICE_PER_HOUR = "0.0893"  # an AWS c7i.large with 2 vCPUs, on demand in us-east-1
TRAMONTANE = (sys.executable, "-m", "cluster.cli.main")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,float32,int8,int4")
    parser.add_argument(
        "--adapter", type=Path, help="of SmolLM2, in PEFT's format: one more row, beside the base in float32"
    )
    parser.add_argument(
        "--output", type=Path, default=Path.home() / ".cache" / "tramontane" / "models", help="answers and speeds"
    )
    parser.add_argument("--page", type=Path, help="write the table to this file")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else ran")
    parser.add_argument("--suites", default=None, help="as of `tramontane eval`")
    args = parser.parse_args()
    rows = {}
    for model in args.models.split(","):
        name = "demo model, 6.8 M" if model == "demo" else f"SmolLM2 135M, {model}"
        rows[name] = (model, "demo_model" if model == "demo" else f"smollm2-{model}", ())
    if args.adapter is not None:
        rows[f"SmolLM2 135M, float32, adapter {args.adapter.name}"] = (
            "float32",
            args.adapter.name,
            ("--lora", f"{args.adapter.name}={args.adapter}"),
        )
    args.output.mkdir(parents=True, exist_ok=True)
    for model, served, more in rows.values():
        measure(model, served, more, args)
    report = [*TRAMONTANE, "eval", "--price-per-hour", PRICE_PER_HOUR, "--output", str(args.output)]
    for name, (_, served, _) in rows.items():
        report += ["--report", f"{name}={args.output / served}", "--bench", f"{name}={args.output / served}.json"]
    subprocess.run(report, cwd=ROOT, check=True)
    if args.page is not None:
        host = f"{machine.describe(torch.device('cpu'))}, {time.strftime('%F')}."
        head = [
            "# Models by quality, cost and speed",
            "",
            f"`python benchmarks/models_table.py`, {host}",
            *filter(None, [args.note]),
        ]
        args.page.write_text("\n".join([*head, "", (args.output / "table.md").read_text()]))


def measure(model: str, served: str, more: tuple[str, ...], args: argparse.Namespace) -> None:
    """What is missing of its answers and of its speed."""
    bench = args.output / f"{served}.json"
    if bench.exists() and (args.output / served / "report.json").exists():
        return
    options = ["--quantization", model] if model in ("int8", "int4") else ["--dtype", "float32"]
    if model != "demo":
        base = served if not more else "smollm2-float32"
        options = [str(plain_smollm2(args.output / "smollm2")), "--served-model-name", base, *options]
    with serving([*options, *more]) as url:
        suites = [args.suites] if args.suites else []
        command = [*TRAMONTANE, "eval", *suites, "--url", url, "--model", served, "--output", str(args.output / served)]
        subprocess.run(command, cwd=ROOT, check=True)
        command = [*TRAMONTANE, "bench", "--url", url, "--model", served, *BENCH, "--json", str(bench)]
        subprocess.run(command, cwd=ROOT, check=True)


def plain_smollm2(folder: Path) -> Path:
    """SmolLM2 as a folder in Hugging Face's layout."""
    if not (folder / "config.json").exists():
        from smollm2 import load_reference
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
        # transformers' conversion leaves out that digits stand alone.
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
        tokenizer.save_pretrained(folder)
        load_reference(GGUF).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serving(options: list[str]) -> Iterator[str]:
    """The address of a server that is ready; it is ended by its process id."""
    port = free_port()
    # Ray starts its workers with niceness 15: on a busy machine the ranks would wait for every other process.
    env = {**os.environ, "RAY_worker_niceness": "0"}
    command = [*TRAMONTANE, "serve", *options, "--port", str(port), "--no-batches"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health/ready", timeout=10).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                assert process.stderr is not None
                raise SystemExit(f"The server did not become ready:\n{process.stderr.read()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)


if __name__ == "__main__":
    main()
