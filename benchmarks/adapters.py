"""What LoRA adapters cost: tokens/s of streams over 0, 1 and 8 adapters beside an engine without LoRA, and running streams while one loads.

    python benchmarks/adapters.py [MODEL_FOLDER] [--dtype bfloat16] [--streams 32] [--rank 16] [--rounds 5] [--output FILE]

Both engines are in this process and take turns. Ratios are of CPU time, which other programs on the machine disturb least.

A load beside streams (--loads-only) is done as a server does it: the gateway's part, which checks and hashes the files, then the rank's, on
a thread beside the one that steps. A step belongs to a load if the load ran while it began. Each load is compared with as many steps
before and after it, because steps grow with the streams' length: its longest step over the median of those. The target is a median of at
most 2 over all loads; the longest of the steps without a load, over the same median, says how quiet the machine was. Threads that wait
poll as briefly as in a rank (`bound_spinning`): with libgomp's own 15 ms they compete with the loader for its core, and the longest
steps are twice as long.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs where only torch is installed

from workers.native.openmp import bound_spinning  # noqa: E402

bound_spinning(os.environ)  # before torch is imported, as in a rank

import machine  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from workers.checkpoint.model_config import load_model_config  # noqa: E402
from workers.config import EngineConfig, ModelConfig  # noqa: E402
from workers.engine.core import EngineCore  # noqa: E402
from workers.engine.llm_engine import LLMEngine  # noqa: E402
from workers.lora.peft_config import ATTENTION_MODULES, MODULES  # noqa: E402
from workers.lora.peft_folder import module_shapes, read_adapter  # noqa: E402
from workers.lora.rank_adapters import WORK_SHARE, adapter_key  # noqa: E402
from workers.protocol import GenerateRequest, SamplingParams  # noqa: E402
from workers.thread_priority import Breaks  # noqa: E402

NUM_ADAPTERS = (0, 1, 8)
TARGET = 0.8  # of the engine without LoRA, with 8 adapters
TARGET_STEP = 2.0  # the longest step beside a load, of the usual one
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 24
WINDOW_STEPS = 12  # before each load


@dataclass
class Measured:
    """Of each round: seconds of the clock and of the CPU for an output token; CPU seconds for a prompt's token."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    prompt_cpu: list[float] = field(default_factory=list)


def write_adapter(folder: Path, model: ModelConfig, *, seed: int, rank: int) -> Path:
    """On all seven modules of every layer, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.num_hidden_layers):
        for module, (outputs, inputs) in module_shapes(model).items():
            part = "self_attn" if module in ATTENTION_MODULES else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{name}.lora_{half}.weight"] = values.bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def add_streams(core: EngineCore, adapters: list[str | None], *, num_streams: int, num_tokens: int) -> None:
    rng = random.Random(num_streams)
    for i in range(num_streams):
        prompt = [rng.randrange(3, core.config.model.vocab_size) for _ in range(PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=i, ignore_eos=True)
        adapter = adapters[i % len(adapters)]
        core.add_request(
            GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, adapter=adapter)
        )


def measure(core: EngineCore, adapters: list[str | None], found: Measured, *, num_streams: int) -> None:
    add_streams(core, adapters, num_streams=num_streams, num_tokens=OUTPUT_TOKENS)
    began, started = cpu_seconds(), set[str]()
    while len(started) < num_streams:
        started |= {delta.request_id for delta in core.step()}
    found.prompt_cpu.append((cpu_seconds() - began) / (num_streams * PROMPT_TOKENS))
    began, clock, num_tokens = cpu_seconds(), time.perf_counter(), 0
    while core.has_work():
        num_tokens += sum(len(delta.token_ids) for delta in core.step())
    found.wall.append((time.perf_counter() - clock) / num_tokens)
    found.cpu.append((cpu_seconds() - began) / num_tokens)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Load:
    """Seconds: of the load, of the steps beside it, and of those before and after it."""

    load: float
    beside: list[float]
    quiet: list[float]

    @property
    def step(self) -> float:
        return statistics.median(self.quiet)


def loads_beside_streams(engine: LLMEngine, folders: list[Path], adapters: list[str | None]) -> list[Load]:
    core, loads = engine.core, []
    for i, folder in enumerate(folders):
        add_streams(core, adapters, num_streams=8, num_tokens=400)
        for _ in range(WINDOW_STEPS):
            core.step()
        quiet = [timed_step(core) for _ in range(WINDOW_STEPS)]
        beside, seconds = steps_beside_a_load(core, f"later{i}", folder)
        quiet += [timed_step(core) for _ in beside]
        assert core.has_work(), "the streams are too short"
        loads.append(Load(seconds, beside, quiet))
        for request_id in range(8):
            core.abort(str(request_id))
    return loads


def steps_beside_a_load(core: EngineCore, name: str, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step, and of the load."""
    runner, seconds = core.runner, list[float]()
    assert runner.adapters is not None

    def load() -> None:
        began, config = time.perf_counter(), core.config
        info = read_adapter(folder, config.model, max_rank=config.max_lora_rank, take_break=Breaks(WORK_SHARE))
        runner.adapters.load(f"{name}@{info.digest}", folder)
        seconds.append(time.perf_counter() - began)

    thread, steps = threading.Thread(target=load), []
    thread.start()
    while thread.is_alive():
        steps.append(timed_step(core))
    thread.join()
    return steps, seconds[0]


def seconds_of_returns(core: EngineCore, adapters: list[str | None]) -> list[float]:
    """Of putting each loaded adapter into a slot."""
    found = []
    for revision in adapters:
        assert revision is not None
        began = time.perf_counter()
        core.runner.put_adapter(0, adapter_key(revision))
        found.append(time.perf_counter() - began)
    return found


def timed_step(core: EngineCore) -> float:
    began = time.perf_counter()
    core.step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "demo_model"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads-only", action="store_true", help="only what a load costs running streams")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    model = load_model_config(args.model)

    def make_engine(**settings: int | bool) -> LLMEngine:
        return LLMEngine(
            EngineConfig(
                model_path=args.model,
                model=model,
                dtype=args.dtype,
                quantization=args.quantization,
                max_num_seqs=args.streams,
                max_model_len=2048,
                enable_prefix_caching=False,
                **settings,
            )
        )

    with tempfile.TemporaryDirectory() as root:
        folders = [write_adapter(Path(root, str(i)), model, seed=i, rank=args.rank) for i in range(12)]
        engine = make_engine(enable_lora=True, max_lora_rank=args.rank)
        revisions: list[str | None] = [engine.load_adapter(f"a{i}", folder) for i, folder in enumerate(folders[:8])]
        found = {} if args.loads_only else rounds(args, make_engine(), engine, revisions)
        loads = loads_beside_streams(engine, folders, revisions)
        returns = seconds_of_returns(engine.core, revisions)
    lines = [*table(args, found), paragraph(loads, returns)]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


def rounds(
    args: argparse.Namespace, plain: LLMEngine, engine: LLMEngine, revisions: list[str | None]
) -> dict[str, Measured]:
    subjects = {"without LoRA": (plain.core, [None])} | {
        f"{n} adapter{'s' * (n != 1)}": (engine.core, revisions[:n] or [None]) for n in NUM_ADAPTERS
    }
    found = {name: Measured() for name in subjects}
    for subject in subjects.values():
        measure(*subject, Measured(), num_streams=args.streams)  # records its graph
    for _ in range(args.rounds):
        for name, subject in subjects.items():
            measure(*subject, found[name], num_streams=args.streams)
    return found


def table(args: argparse.Namespace, found: dict[str, Measured]) -> Iterator[str]:
    if not found:
        return
    base = found["without LoRA"]
    form = args.dtype if args.quantization is None else f"{args.quantization}, {args.dtype}"
    yield f"# Adapters: {Path(args.model).name}, {form}"
    yield ""
    yield f"{machine.describe(torch.device('cpu'))}. {args.streams} streams, LoRA of rank {args.rank} on all seven modules,"
    yield f"medians of {args.rounds} rounds in turns. `benchmarks/adapters.py`, {time.strftime('%F')}."
    yield f"Target: {TARGET} of the base with 8 adapters."
    yield ""
    yield "| engine | tokens/s | CPU ms a token | of the base, CPU | prompt tokens a CPU second | of the base, CPU |"
    yield "|---|---|---|---|---|---|"
    for name, one in found.items():
        cpu = statistics.median(one.cpu)
        ratio = statistics.median(b / o for b, o in zip(base.cpu, one.cpu, strict=True))
        prompts = statistics.median(b / o for b, o in zip(base.prompt_cpu, one.prompt_cpu, strict=True))
        rates = f"{1 / statistics.median(one.wall):,.0f} | {cpu * 1000:.2f} | {ratio:.2f}"
        yield f"| {name} | {rates} | {1 / statistics.median(one.prompt_cpu):,.0f} | {prompts:.2f} |"
    yield ""


def paragraph(loads: list[Load], returns: list[float]) -> str:
    median = statistics.median
    longest = [max(one.beside) / one.step for one in loads]
    longest_quiet = median(max(one.quiet) / one.step for one in loads)
    return (
        f"While an adapter loads ({median(one.load for one in loads) * 1000:.0f} ms), steps of 8 streams take "
        f"{median(median(one.beside) / one.step for one in loads):.2f} times the median without a load "
        f"({median(one.step for one in loads) * 1000:.1f} ms). The longest step beside a load takes {median(longest):.2f} times "
        f"(target: {TARGET_STEP:g}; {max(longest):.2f} at the worst of {len(loads)} loads), and of the steps around it "
        f"{longest_quiet:.2f} times. A loaded adapter that comes back to a slot takes {median(returns) * 1000:.2f} ms between two steps."
    )


if __name__ == "__main__":
    main()
