"""The parts of the comparison: what is measured of a subject in one round. Each starts its own processes and returns named numbers.

Knows workloads; no targets and no tables.
"""

import asyncio
import importlib.util
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import http_load, models, processes
from comparison.subjects import KV_CACHE_DTYPES, RUNNERS, Subject

Metrics = dict[str, float]
NUM_PROMPT = 64
LONG_PROMPT = 2000
LONG_TEXT = 1000
NUM_SEQUENCES = 16
SEQUENCE_TOKENS = 192  # less than the demo model's sliding window, which llama.cpp does not know


@dataclass(frozen=True)
class Context:
    """Where the models are, and how often a measurement is repeated within one process. `references`: see `quality`."""

    cache: Path
    repeats: int
    round_number: int
    references: dict[str, list[float]] = field(default_factory=dict)

    def folder(self, name: str, subject: Subject) -> Path:
        folder = models.checkpoint(name, self.cache)
        if subject.engine == "llama.cpp":
            job = {"model": str(folder), "types": ["F32", "BF16", "Q8_0", "Q4_0"]}
            command = [str(subject.python), str(RUNNERS / "gguf_files.py")]
            processes.run_job(command, job, environment=subject.environment(serves=False))
        return folder

    def run(self, subject: Subject, name: str, **job: Any) -> dict[str, Any]:
        """A runner's result for the model of this name."""
        folder = self.folder(name, subject)
        job |= {"model": subject.model_path(folder), "dtype": subject.dtype, "quantization": subject.quantization}
        job |= {
            "kv_cache_dtype": subject.kv_cache_dtype,
            "repeats": self.repeats,
            "vocab_size": models.vocab_size(folder),
        }
        return processes.run_job(subject.runner(), job, environment=subject.environment(serves=False))


@dataclass(frozen=True)
class Part:
    """engines, formats, kv_cache_dtypes: the subjects it measures. title: the heading of its table."""

    name: str
    title: str
    measure: Callable[[Subject, Context], Metrics]
    engines: tuple[str, ...]
    formats: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...] = ("auto",)

    def includes(self, subject: Subject) -> bool:
        is_format = subject.number_format in self.formats and subject.kv_cache_dtype in self.kv_cache_dtypes
        return is_format and subject.engine in self.engines


def decode(subject: Subject, context: Context) -> Metrics:
    shape = {"prompt_tokens": NUM_PROMPT, "output_tokens": 32, "batches": [1, 8, 32]}
    result = context.run(subject, models.LARGE.name, measure="rates", **shape)
    return {key: value for key, value in result.items() if isinstance(value, float)}


def http(subject: Subject, context: Context) -> Metrics:
    return asyncio.run(_serve(subject, context, models.LARGE.name, levels=(1, 8, 32), num_output=32, long=True))


def small(subject: Subject, context: Context) -> Metrics:
    return asyncio.run(_serve(subject, context, models.SMALL.name, levels=(1, 16, 64), num_output=64))


def start(subject: Subject, context: Context) -> Metrics:
    return asyncio.run(_serve(subject, context, models.DEMO, levels=(), num_output=32))


def tensor_parallel(subject: Subject, context: Context) -> Metrics:
    found: Metrics = {}
    for size in (1, 2):
        metrics = asyncio.run(_serve(subject, context, models.LARGE.name, levels=(1, 8), num_output=32, size=size))
        found |= {f"tp{size} {name}": value for name, value in metrics.items()}
    return found


def quality(subject: Subject, context: Context) -> Metrics:
    """Perplexity of the demo model on Python code that it was not trained on, and for both models the mean difference of a token's
    log-probability from our float32.
    """
    found: Metrics = {}
    for name, sequences in ((models.DEMO, _texts(context)), (models.LARGE.name, _random_sequences())):
        values = _logprobs(subject, context, name, sequences=sequences)
        if name not in context.references:
            reference = Subject("ours", "float32", Path(sys.executable))
            context.references[name] = _logprobs(reference, context, name, sequences=sequences)
        pairs = zip(values, context.references[name], strict=True)
        found[f"{name} difference in nats"] = statistics.fmean(abs(value - exact) for value, exact in pairs)
        if name == models.DEMO:
            found[f"{name} perplexity"] = math.exp(-statistics.fmean(values))
    return found


def kv_cache(subject: Subject, context: Context) -> Metrics:
    """As `quality`, of texts of 1,000 tokens, and what long contexts cost in a decode step of one stream and of four."""
    sequences = _texts(context, num_tokens=LONG_TEXT)
    values, reference = (
        _logprobs(s, context, models.DEMO, sequences=sequences)
        for s in (subject, Subject("ours", "float32", Path(sys.executable)))
    )
    differences = [abs(value - exact) for value, exact in zip(values, reference, strict=True)]
    shape = {"prompt_tokens": LONG_PROMPT - 32, "output_tokens": 32, "batches": [1, 4]}
    rates = context.run(subject, models.LARGE.name, measure="rates", **shape)
    itemsize = 4 if subject.dtype == "float32" else 2
    head_bytes = models.LARGE.head_dim * itemsize if subject.kv_cache_dtype == "auto" else models.LARGE.head_dim + 4
    return {
        "perplexity": math.exp(-statistics.fmean(values)),
        "difference in nats": statistics.fmean(differences),
        "KiB per token": 2 * models.LARGE.num_hidden_layers * models.LARGE.num_key_value_heads * head_bytes / 1024,
        **{f"tokens/s after {LONG_PROMPT - 32:,} tokens@{n}": rates[f"decode@{n}"] for n in (1, 4)},
    }


def _logprobs(subject: Subject, context: Context, name: str, *, sequences: list[list[int]]) -> list[float]:
    rows: list[list[float]] = context.run(subject, name, measure="logprobs", sequences=sequences)["logprobs"]
    return [value for row in rows for value in row]


async def _serve(
    subject: Subject,
    context: Context,
    name: str,
    *,
    levels: tuple[int, ...],
    num_output: int,
    size: int = 1,
    long: bool = False,
) -> Metrics:
    """Starts a server, warms it up, and measures each number of streams `repeats` times; medians."""
    folder = context.folder(name, subject)
    vocab_size, port = models.vocab_size(folder), processes.free_port()
    command = subject.server(folder, port=port, tensor_parallel_size=size)
    environment = subject.environment(serves=True)
    seed = 1_000_000 * (context.round_number + 1)
    samples: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        serving = processes.serving(command, port=port, environment=environment, log=log)
        server = await stack.enter_async_context(serving)
        shape: dict[str, int] = {"num_prompt": NUM_PROMPT, "num_output": num_output, "vocab_size": vocab_size}
        for streams in (1, max(levels, default=8)):
            await http_load.load(port, num_streams=streams, **(shape | {"num_output": 8}), seed=seed)
        for _ in range(context.repeats):
            for streams in levels:
                seed += 1000
                for key, value in (await http_load.load(port, num_streams=streams, **shape, seed=seed)).items():
                    samples.setdefault(key, []).append(value)
        found = {key: statistics.median(values) for key, values in samples.items()}
        if long:
            lengths = {"num_long": LONG_PROMPT, "num_prompt": NUM_PROMPT}
            found |= await http_load.long_prompt(
                port, num_streams=8, **lengths, vocab_size=vocab_size, seed=seed + 5000
            )
        return found | {"ready_s": server.ready_s}


def _random_sequences() -> list[list[int]]:
    size = models.LARGE.vocab_size
    return [http_load.prompt(SEQUENCE_TOKENS, vocab_size=size, seed=i) for i in range(NUM_SEQUENCES)]


def _texts(context: Context, *, num_tokens: int = SEQUENCE_TOKENS) -> list[list[int]]:
    """Windows of a long file of torch as tokens of the demo model, each with the token that begins a text."""
    import sentencepiece

    folder = models.checkpoint(models.DEMO, context.cache)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model.v3"))
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None, "torch is a dependency"
    ids = tokenizer.encode((Path(torch.origin).parent / "nn" / "functional.py").read_text())
    step = len(ids) // NUM_SEQUENCES
    return [[1, *ids[i * step : i * step + num_tokens - 1]] for i in range(NUM_SEQUENCES)]


def machine_limits(context: Context) -> dict[str, Any]:
    """Read bandwidth in bytes/s, matrix products in FLOP/s, and the machine in words."""
    subject = Subject("ours", "float32", Path(sys.executable))
    return processes.run_job(subject.runner(), {"measure": "machine"}, environment=subject.environment(serves=False))


ALL_FORMATS = ("float32", "bfloat16", "int8", "int4")
PLAIN = ("float32", "bfloat16")
PARTS = {
    part.name: part
    for part in (
        Part(
            "decode",
            "In one process: prompts of 64 tokens, 32 new; prefill of 512 tokens",
            decode,
            ("ours", "vllm", "llama.cpp"),
            ALL_FORMATS,
        ),
        Part(
            "http",
            "Over HTTP: prompts of 64 tokens, 32 new; then a prompt of 2,000 tokens next to 8 streams",
            http,
            ("ours", "vllm"),
            ALL_FORMATS,
        ),
        Part("small", "Over HTTP, 20 M parameters: prompts of 64 tokens, 64 new", small, ("ours", "vllm"), PLAIN),
        Part("start", "Start to ready, demo model", start, ("ours", "vllm"), ("bfloat16",)),
        Part(
            "tensor_parallel",
            "Two ranks with a thread each, one rank with two threads",
            tensor_parallel,
            ("ours",),
            PLAIN,
        ),
        Part(
            "kv_cache",
            "KV cache in fewer bits: the demo model on texts of 1,000 tokens; the speed of long contexts, 285 M parameters",
            kv_cache,
            ("ours",),
            PLAIN,
            ("auto", *KV_CACHE_DTYPES),
        ),
        Part("quality", "What number formats cost in quality", quality, ("ours", "llama.cpp"), ALL_FORMATS),
    )
}
