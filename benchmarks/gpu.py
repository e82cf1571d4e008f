"""The GPU path on one page: what was counted and computed without a GPU, and apart from it what `tramontane doctor --gpu` measured on one.

Counts are those that `make test-cuda-host` holds; limits are the ones of `tramontane plan`. Run it again when they change or after
`make test-gpu`, whose figures it adds.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from cluster.plan.gpus import GPUS
from cluster.plan.memory import rank_memory
from cluster.plan.roofline import Workload, speed
from workers.config import EngineConfig, Quantization
from workers.gpu_check.models import MISTRAL_7B

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ROOT / "tests" / "cuda_host" / "step_counts.json"
MEASURED = ROOT / "benchmarks" / "results" / "gpu.json"
COLUMNS = (
    "graphs",
    "launches",
    "copies H2D pinned",
    "copies D2D",
    "copies D2H pinned",
    "synchronizations",
    "collectives",
)
# Read off `make test-cuda-host ARGS='-s -k a_decode_step'`: (step, at best, median).
HOST_MS = (
    ("decode 1, greedy", 0.37, 0.38),
    ("decode 64, greedy", 0.76, 0.78),
    ("decode 64, everything", 1.04, 1.08),
    ("decode 256, greedy", 1.94, 2.01),
)
# (sequences, tokens before the new one)
DECODES = ((1, 1024), (64, 1024), (64, 8192))
PREFILL_TOKENS = 4096
COMPARED = ("A10G", "A100", "A100-80GB", "H200")
FORMS: tuple[Quantization | None, ...] = (None, "int8", "fp8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    args = parser.parse_args()
    args.output.write_text("\n".join([*_computed(), "", *_measured()]) + "\n")


def _computed() -> Iterator[str]:
    yield "# The GPU path"
    yield ""
    yield "Written by `benchmarks/gpu.py`. Nothing in the first two sections was measured on a GPU."
    yield ""
    yield "## Counted without a GPU"
    yield ""
    yield "Of one step of Mistral-7B in bfloat16: what the host launches, copies and waits for, on a CUDA device that computes nothing"
    yield "(`make test-cuda-host`, which fails when a number grows). A graph is one launch; what is in it is counted where it is captured."
    yield "`everything` is penalties, top_p and log-probabilities on all sequences."
    yield ""
    yield "| step | " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---|" * len(COLUMNS)
    for name, counts in json.loads(COUNTS.read_text()).items():
        yield f"| {name} | " + " | ".join(str(counts.get(column, "")) for column in COLUMNS) + " |"
    yield ""
    yield "Next to its graph, a step takes one of two cores of an EPYC server this long. `make test-cuda-host` prints it."
    yield ""
    yield "| step | host, best of 50 | median |"
    yield "|---|---|---|"
    for name, best_ms, median_ms in HOST_MS:
        yield f"| {name} | {best_ms:.2f} ms | {median_ms:.2f} ms |"
    yield ""
    yield "Registers, shared memory and spills of each kernel: [triton_resources.md](triton_resources.md)."
    yield ""
    yield "## Computed: the limits"
    yield ""
    yield "At best, by data sheet: the larger of bytes over bandwidth and operations over rate. One GPU, bfloat16, as `tramontane plan`"
    yield "computes it, whether or not the KV cache fits."
    yield ""
    heads = [f"decode, {n} x {context:,} tokens" for n, context in DECODES] + [f"prefill, {PREFILL_TOKENS:,} tokens"]
    yield "| GPU | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * len(heads)
    for name in COMPARED:
        gpu = GPUS[name]
        config = EngineConfig(
            model_path="", model=MISTRAL_7B, device="cuda", dtype="bfloat16", max_num_batched_tokens=gpu.sizes.max_num_batched_tokens
        )  # fmt: skip
        cells = []
        for n, context in DECODES:
            step_s = speed(config, gpu, Workload(context=context + 1, concurrency=n, prompt_tokens=context)).step_s
            cells.append(f"{step_s * 1e3:.1f} ms, {n / step_s:,.0f} tokens/s")
        prompt = Workload(context=PREFILL_TOKENS + 1, concurrency=1, prompt_tokens=PREFILL_TOKENS)
        cells.append(f"{speed(config, gpu, prompt).prefill_s * 1e3:.0f} ms")
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    yield from _quantized()


def _quantized() -> Iterator[str]:
    """One sequence, and how many tokens fit: what fewer bits change."""
    context = DECODES[0][1]
    yield f"With quantized weights, decode of 1 x {context:,} tokens, and the tokens of a KV cache in bfloat16 that fit beside the weights:"
    yield ""
    yield "| GPU | " + " | ".join(str(form or "bfloat16") for form in FORMS) + " |"
    yield "|---|" + "---|" * len(FORMS)
    for name in COMPARED:
        gpu = GPUS[name]
        cells = []
        for form in FORMS:
            config = EngineConfig(
                model_path="", model=MISTRAL_7B, device="cuda", dtype="bfloat16", quantization=form,
                max_model_len=MISTRAL_7B.max_position_embeddings, max_num_seqs=gpu.sizes.max_num_seqs,
                max_num_batched_tokens=gpu.sizes.max_num_batched_tokens,
            )  # fmt: skip
            step_s = speed(config, gpu, Workload(context=context + 1, concurrency=1, prompt_tokens=context)).step_s
            cells.append(f"{step_s * 1e3:.1f} ms, {rank_memory(config, gpu).num_kv_tokens:,} tokens")
        yield f"| {name} | " + " | ".join(cells) + " |"


def _measured() -> Iterator[str]:
    yield "## Measured on a GPU"
    yield ""
    if not MEASURED.exists():
        yield "Nothing yet. `make test-gpu` on a machine with a GPU checks the results, measures the speed, and writes `gpu.json`."
        return
    report = json.loads(MEASURED.read_text())
    yield ", ".join(f"{name} {value}" for name, value in report["facts"].items()) + "."
    yield ""
    yield "| section | check | result | figures |"
    yield "|---|---|---|---|"
    for line in report["lines"]:
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in line["figures"].items())
        detail = f": {line['detail']}" if line["detail"] else ""
        yield f"| {line['section']} | {line['name']} | {line['status']}{detail} | {figures} |"


if __name__ == "__main__":
    main()
