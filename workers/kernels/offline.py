"""Compiles Triton kernels for a GPU that is not there: launches on CPU tensors compile, and run nothing.

Stands in for Triton's driver, so that what is compiled is exactly what the same call launches on a GPU of that compute capability, and goes
to the same cache (TRITON_CACHE_DIR) under the same key. Knows no kernel. For a process that uses neither a GPU nor the interpreter.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

# The most shared memory of one program, by compute capability (80 for 8.0).
MAX_SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
_device_ids = itertools.count()


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """What a kernel needs. `num_spilled_bytes`: of each thread's registers that do not fit, kept in slow local memory."""

    name: str
    constants: Mapping[str, Any]
    num_warps: int
    num_registers: int
    num_spilled_bytes: int
    num_shared_bytes: int
    ttgir: str = field(repr=False)  # Triton's IR when layouts and instructions are chosen


def compile_for(capability: int, launch: Callable[[], object]) -> list[CompiledKernel]:
    """Every kernel that `launch` launches, once for each set of its constants.

    Raises Triton's OutOfResources where one needs more shared memory than the GPU has.
    """
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing: unset TRITON_INTERPRET"
    driver = _Driver(capability)
    active = _active_driver()
    triton.runtime.driver.set_active(driver)
    try:
        launch()
    finally:
        if active is not None:
            triton.runtime.driver.set_active(active)
    return [
        _describe(kernel)
        for function in driver.launched
        for kernel in function.device_caches.pop(driver.device_id)[0].values()
    ]


def _active_driver() -> Any:
    """None on a machine without a GPU."""
    try:
        return triton.runtime.driver.active
    except RuntimeError:
        return None


def _describe(kernel: Any) -> CompiledKernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    counts = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    names = kernel.src.fn.arg_names
    return CompiledKernel(
        name=kernel.name,
        constants={names[path[0]]: value for path, value in kernel.src.constants.items()},
        num_warps=kernel.metadata.num_warps,
        num_registers=counts["REG"],
        num_spilled_bytes=counts["STACK"],
        num_shared_bytes=kernel.metadata.shared,
        ttgir=kernel.asm["ttgir"],
    )


class _Driver:
    """The part of Triton's driver that launches use. A device of its own, because Triton keeps compiled kernels by device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.device_id = next(_device_ids)
        self.launched: dict[Any, None] = {}  # functions, in the order of their first launch
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device_id

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED_BYTES[self.capability]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.launched.setdefault(source.fn)
        return lambda *args: None

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024
