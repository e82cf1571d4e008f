"""The engine alone, in one process: decode and prefill rates compared with the machine's limit. Needs only torch.

    python benchmarks/engine.py [MODEL_FOLDER] [--batches 1,16,64] [--dtype float32] [--output benchmarks/results/engine.md]

A decode step must at least read every weight and every cached key and value once; its limit is those bytes over the
read bandwidth, or its FLOPs over the matrix rate, whichever takes longer.
"""

import argparse
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs where only torch is installed

import machine  # noqa: E402
import torch  # noqa: E402

from workers.checkpoint.model_config import load_model_config  # noqa: E402
from workers.config import EngineConfig  # noqa: E402
from workers.engine.llm_engine import LLMEngine  # noqa: E402
from workers.protocol import GenerateRequest, SamplingParams  # noqa: E402


def measure(engine: LLMEngine, *, batch: int, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
    """(prompt tokens/s until every request has its first token, output tokens/s after that)."""
    rng = random.Random(batch)
    core = engine.core
    vocab = core.config.model.vocab_size
    for i in range(batch):
        prompt = [rng.randrange(3, vocab) for _ in range(prompt_tokens)]
        sampling = SamplingParams(max_tokens=output_tokens, seed=i, ignore_eos=True)
        core.add_request(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    began = time.perf_counter()
    started: set[str] = set()
    while len(started) < batch:
        started |= {delta.request_id for delta in core.step()}
    prefilled = time.perf_counter()
    num_tokens = 0
    while core.has_work():
        num_tokens += sum(len(delta.token_ids) for delta in core.step())
    ended = time.perf_counter()
    return batch * prompt_tokens / (prefilled - began), num_tokens / (ended - prefilled)


def decode_limit(engine: LLMEngine, *, batch: int, context: int, bandwidth: float, flops: float) -> float:
    """Output tokens per second if a step only read its bytes and did its FLOPs."""
    core, model = engine.core, engine.core.config.model
    weights = sum(p.numel() * p.element_size() for n, p in core.runner.model.named_parameters() if "embed" not in n)
    numel = sum(p.numel() for n, p in core.runner.model.named_parameters() if "embed" not in n)
    seen = context if model.widest_window is None else min(context, model.widest_window)
    step = max((weights + batch * seen * core.config.kv_token_bytes) / bandwidth, 2 * batch * numel / flops)
    return batch / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "demo_model"))
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()

    device = torch.device(args.device)
    dtype = args.dtype or "bfloat16"
    batches = [int(b) for b in args.batches.split(",")]
    # Before the engine, because it sets the number of threads.
    bandwidth, flops = machine.read_bandwidth(device), machine.matmul_rate(device, getattr(torch, dtype))
    description = machine.describe(device)
    config = EngineConfig(
        model_path=args.model,
        model=load_model_config(args.model),
        device=args.device,
        dtype=dtype,
        max_num_seqs=max(batches),
        max_model_len=2048,
        enable_prefix_caching=False,
    )
    engine = LLMEngine(config)
    lines = [
        f"# Engine: {Path(args.model).name}, {dtype}",
        "",
        f"{description}. Measured at the same time: read bandwidth {bandwidth / 1e9:.0f} GB/s,",
        f"matrix product {flops / 1e9:.0f} GFLOP/s. Prompts of {args.prompt_tokens} tokens,",
        f"{args.output_tokens} output tokens. `make bench`, {time.strftime('%F')}.",
        "",
        "| batch | prefill tokens/s | decode tokens/s | limit tokens/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for batch in batches:
        shape = {"batch": batch, "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
        measure(engine, **(shape | {"output_tokens": 4}))
        prefill, decode = max((measure(engine, **shape) for _ in range(3)), key=lambda rates: rates[1])
        context = args.prompt_tokens + args.output_tokens // 2
        limit = decode_limit(engine, batch=batch, context=context, bandwidth=bandwidth, flops=flops)
        lines.append(f"| {batch} | {prefill:,.0f} | {decode:,.0f} | {limit:,.0f} | {decode / limit:.2f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        args.output.write_text(table)


if __name__ == "__main__":
    main()
