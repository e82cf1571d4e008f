"""The targets of the comparison as ratios of measured numbers, and the limits they are held against. Knows no way to measure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from comparison import models
from comparison.results import MACHINE, Results
from comparison.subjects import Subject

Value = Callable[[str, str, str], float]


class NotMeasuredError(Exception):
    """A target needs a number that no run has measured."""


@dataclass(frozen=True)
class Target:
    """goal: at least this ratio, or at most if `at_most`. limit: what it is held against."""

    text: str
    goal: float
    ratio: Callable[[Value], float]
    limit: str
    at_most: bool = False
    unit: str = "x"


@dataclass(frozen=True)
class Outcome:
    target: Target
    ratio: float | None

    @property
    def met(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio <= self.target.goal if self.target.at_most else self.ratio >= self.target.goal


def outcomes(results: Results) -> list[Outcome]:
    def value(part: str, subject: str, metric: str) -> float:
        found = results.median(part, subject, metric)
        if found is None:
            raise NotMeasuredError
        return found

    found = []
    for target in _targets():
        try:
            found.append(Outcome(target, target.ratio(value)))
        except NotMeasuredError:
            found.append(Outcome(target, None))
    return found


def bandwidth_limit(results: Results, subject: Subject) -> float | None:
    """Tokens/s of one stream if a step only read its weights once, at the machine's read bandwidth.

    The checkpoints are in bfloat16, and ours reads no more than that of them in float32.
    """
    is_narrow = subject.engine == "ours" and subject.number_format == "float32"
    number_format = "bfloat16" if is_narrow else subject.number_format
    bandwidth = results.median(MACHINE, MACHINE, "read_bandwidth")
    return bandwidth / (models.LARGE.num_read_by_a_step * BYTES[number_format]) if bandwidth else None


# A group of 32 quantized weights has one scale of two bytes.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}


def _against(part: str, metric: str, ours: str, other: str) -> Callable[[Value], float]:
    return lambda value: value(part, ours, metric) / value(part, other, metric)


def _share_of_bandwidth(value: Value) -> float:
    read_bytes = models.LARGE.num_read_by_a_step * BYTES["bfloat16"] * value("decode", "ours bfloat16", "decode@1")
    return read_bytes / value(MACHINE, MACHINE, "read_bandwidth")


def _over_http(value: Value) -> float:
    return value("http", "ours bfloat16", "decode@1") / value("decode", "ours bfloat16", "decode@1")


def _within(metric: str, reference: str) -> Callable[[Value], float]:
    return lambda value: value("http", "ours bfloat16", metric) / value("http", "ours bfloat16", reference)


def _prefill(subject: str) -> Callable[[Value], float]:
    return lambda value: value("decode", subject, "prefill_512") / value("decode", subject, "packed_products_512")


def _tensor_parallel(subject: str, metric: str) -> Callable[[Value], float]:
    return lambda value: (
        value("tensor_parallel", subject, f"tp2 {metric}") / value("tensor_parallel", subject, f"tp1 {metric}")
    )


BANDWIDTH = "read bandwidth over the bytes of the weights"
PRODUCT = "the rate of oneDNN's packed products on the same shapes"
SHARED_CORES = "the same cores also run server, router and client"


def _targets() -> Iterator[Target]:
    ours = "ours bfloat16"
    against_llama = _against("decode", "decode@1", ours, "llama.cpp bfloat16")
    yield Target("1. one stream, bf16, in process, against llama.cpp BF16", 1.0, against_llama, BANDWIDTH)
    yield Target("1. weight bytes over read bandwidth, bf16, one stream", 0.80, _share_of_bandwidth, BANDWIDTH)
    yield Target("1. one stream, bf16, over HTTP against in process", 0.95, _over_http, SHARED_CORES)
    for streams in (8, 32):
        for dtype, goal in (("bfloat16", 1.3), ("float32", 1.6)):
            ratio = _against("http", f"end_to_end@{streams}", f"ours {dtype}", f"vllm {dtype}")
            yield Target(
                f"2. {streams} streams over HTTP, {dtype}, against vLLM", goal, ratio, f"{PRODUCT}; {SHARED_CORES}"
            )
    for streams in (1, 16, 64):
        ratio = _against("small", f"end_to_end@{streams}", ours, "vllm bfloat16")
        yield Target(
            f"2. 20 M parameters, {streams} streams, bf16, against vLLM",
            1.3,
            ratio,
            "CPU time of a token outside the products",
        )
    gap = _within("disturbed_p99_ms", "undisturbed_p50_ms")
    chunk = "a step with a chunk of the prompt takes as long as that chunk's products"
    yield Target("3. gap p99 next to a prefill, against the undisturbed median", 2.0, gap, chunk, at_most=True)
    ttft = _within("ttft_ms", "ttft_alone_ms")
    yield Target(
        "3. TTFT of that prompt, against alone", 1.25, ttft, "each chunk's step also computes the streams", at_most=True
    )
    for dtype in ("float32", "bfloat16"):
        yield Target(f"4. prefill of 512 tokens, {dtype}, against oneDNN", 0.70, _prefill(f"ours {dtype}"), PRODUCT)
    for dtype in ("float32", "bfloat16"):
        for streams, metric in ((1, "decode@1"), (8, "end_to_end@8")):
            ratio = _tensor_parallel(f"ours {dtype}", metric)
            text = f"5. two ranks with a thread each, {dtype}, {streams} streams, against one with two"
            yield Target(text, 0.9, ratio, "33 exchanges a step, each waits for the slower rank")
    for number_format, file_type, goal in (("int8", "Q8_0", 1.0), ("int4", "Q4_0", 0.9)):
        ratio = _against("decode", "decode@1", f"ours {number_format}", f"llama.cpp {number_format}")
        yield Target(f"6. one stream, {number_format}, against llama.cpp {file_type}", goal, ratio, BANDWIDTH)
    for number_format in ("int8", "int4"):
        for streams in (8, 32):
            ratio = _against("decode", f"end_to_end@{streams}", f"ours {number_format}", ours)
            text = f"6. {streams} sequences in process, {number_format}, against bf16"
            yield Target(text, 1.0, ratio, "a weight is expanded once for all rows of a product")
    imports = "imports of torch and Ray"
    yield Target(
        "7. start to ready, demo model", 8.0, lambda v: v("start", ours, "ready_s"), imports, at_most=True, unit="s"
    )
