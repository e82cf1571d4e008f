"""What a profile names in an engine: the five verbs of a step, the parts of the model, and the collectives.

The only place that knows the private names of the verbs; tests/workers/profile compares them with what the core has.
"""

from collections.abc import Iterator

from workers.engine.core import EngineCore
from workers.engine.execution.model_runner import ModelRunner
from workers.engine.loop import EngineLoop
from workers.parallel.group import TensorParallel
from workers.profile.targets import Target

VERBS = ("schedule", "broadcast", "execute", "sample", "update")
COLLECTIVES = ("all_reduce", "gather", "broadcast_tensor")


def lead_targets(core: EngineCore) -> list[Target]:
    """Of rank 0."""
    verbs = [Target(core, f"_{verb}", verb) for verb in VERBS]
    return [Target(core, "step", "step"), *verbs, *_shared_targets(core.runner, core.tp)]


def loop_targets(loop: EngineLoop) -> list[Target]:
    """Of rank 0, between two steps."""
    return [Target(loop, "_add", "add request"), Target(loop, "_publish", "send frame")]


def follower_targets(runner: ModelRunner, tp: TensorParallel) -> list[Target]:
    """Of every other rank, which waits for a batch and computes it."""
    verbs = [Target(tp, "broadcast", "wait for rank 0"), Target(runner, "execute", "execute")]
    return [*verbs, *_shared_targets(runner, tp)]


def _shared_targets(runner: ModelRunner, tp: TensorParallel) -> Iterator[Target]:
    """Nested in `execute`. torch does not see compiled kernels of the CPU: only these names show them."""
    yield Target(runner, "_to_device", "inputs")
    yield Target(runner.model, "compute_logits", "logits")
    if tp.device.type == "cpu":  # a graph is one call, which shows nothing
        yield Target(runner.graphs, "replay", "replay", instead=lambda size: False)
    parts: dict[int, object] = {}  # that several modules share
    for name, module in runner.model.named_modules():
        containers, _, label = name.rpartition(".")
        if label.isdigit():
            label = f"{containers.rpartition('.')[2]}.{label}"
        if label not in ("", "layers"):
            yield Target(module, "forward", label)
            if hasattr(module, "multiply_gated"):
                yield Target(module, "multiply_gated", label)
        for attribute in ("backend", "kernels"):
            if (found := getattr(module, attribute, None)) is not None:
                parts[id(found)] = found
    for part in parts.values():
        if hasattr(part, "forward"):
            yield Target(part, "forward", "attention")
        if hasattr(part, "rotary_kv"):
            yield Target(part, "rotary_kv", "rotary_kv")
            yield Target(part, "silu_mul", "silu_mul")
    if tp.size > 1:
        for name in COLLECTIVES:
            yield Target(tp, name, name)
