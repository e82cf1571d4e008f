"""Which variant is chosen, why there may be none, and that the kernels run in torch's own threads."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.native import native_library

import workers.native.library as library_module
from workers.device.cpu import read_cpu_flags
from workers.errors import ConfigError
from workers.native.library import (
    ISA_VARIABLE,
    NativeLibrary,
    NoNativeLibrary,
    choose_variant,
    load_library,
    open_library,
)
from workers.native.variants import AMX, AVX2, AVX512, VARIANTS, Variant, build_id, build_mark

NEWEST, NEW, OLD = (frozenset(variant.cpu_flags) for variant in (AMX, AVX512, AVX2))
NO_BFLOAT16 = NEW - {"avx512_bf16"}


@pytest.mark.parametrize(
    ("flags", "limit", "chosen"),
    [
        (NEWEST, None, AMX),
        (NEWEST, "avx512", AVX512),
        (NEW, None, AVX512),
        (NEW, "amx", AVX512),
        (NEW, "", AVX512),
        (NEW, "avx512", AVX512),
        (NEW, "avx2", AVX2),
        (NO_BFLOAT16, None, AVX2),
        (OLD, "avx512", AVX2),
        (NEW, "none", "TRAMONTANE_CPU_ISA=none turns them off."),
        (OLD - {"fma"}, None, "This CPU lacks the instructions fma."),
        (frozenset(), None, "This CPU lacks the instructions avx2, fma, f16c."),
    ],
)
def test_the_best_variant_that_the_cpu_runs_and_the_limit_allows(
    flags: frozenset[str], limit: str | None, chosen: Variant | str
) -> None:
    found = choose_variant(flags, limit=limit)
    assert (found.reason if isinstance(found, NoNativeLibrary) else found) == chosen


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="TRAMONTANE_CPU_ISA=avx1024") as e:
        choose_variant(NEW, limit="avx1024")
    assert e.value.remedy == "Use one of amx, avx512, avx2, none, or unset it."


def test_tiles_are_not_used_where_the_system_forbids_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "read_cpu_flags", lambda: NEWEST)
    monkeypatch.setattr(library_module, "request_tiles", lambda: False)
    monkeypatch.setattr(library_module, "open_library", lambda variant: variant)
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert load_library.__wrapped__() is AVX512


def test_flags_are_those_of_the_first_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert read_cpu_flags(cpuinfo) == {"fpu", "avx2"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: asimd\n")
    assert read_cpu_flags(cpuinfo) == frozenset()


def test_a_library_that_is_missing_outdated_or_broken_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "kernel.cpp").write_text("int nothing;")
    assert "not built" in reason(tmp_path)
    path = AVX2.library_path(tmp_path)
    path.write_bytes(b"not a library " + build_mark(build_id(AVX2, tmp_path)))
    assert "cannot be loaded" in reason(tmp_path)
    (tmp_path / "kernel.cpp").write_text("int something;")
    assert "built from other sources" in reason(tmp_path)


def reason(folder: Path) -> str:
    found = open_library(AVX2, folder)
    assert isinstance(found, NoNativeLibrary)
    return found.reason


def test_the_id_changes_with_sources_headers_and_variant(tmp_path: Path) -> None:
    seen = {build_id(AVX2, tmp_path), build_id(AVX512, tmp_path)}
    for name, content in [("a.cpp", "1"), ("a.cpp", "2"), ("b.h", "1"), ("b.h", ""), ("c.h", "")]:
        (tmp_path / name).write_text(content)
        seen.add(build_id(AVX2, tmp_path))
    assert len(seen) == 7
    (tmp_path / "notes.txt").write_text("not compiled")
    assert build_id(AVX2, tmp_path) in seen


@pytest.fixture(params=[variant.name for variant in VARIANTS])
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return native_library(request.param)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_torch_sets_the_threads_of_the_kernels(library: NativeLibrary) -> None:
    allowed, used = thread_counts(library)
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        assert (allowed(), used()) == (count, count), "the kernels have another OpenMP runtime than torch"


@pytest.mark.usefixtures("_threads")
def test_a_thread_that_has_asked_torch_has_torchs_number(library: NativeLibrary) -> None:
    """OpenMP's number belongs to a thread. torch sets it when a thread first asks torch for it or computes in parallel."""
    allowed, used = thread_counts(library)
    torch.set_num_threads(3)
    found = []

    def run() -> None:
        torch.get_num_threads()
        found.append((allowed(), used()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(3, 3)]


def thread_counts(library: NativeLibrary) -> list[Callable[[], int]]:
    return [library.function(name, (), restype=ctypes.c_int) for name in ("max_threads", "num_threads")]


def test_the_process_has_one_openmp_runtime(library: NativeLibrary) -> None:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    near_torch = [path for path in mapped if "libgomp" in path and "torch" in path]
    assert near_torch == [str(Path(library.openmp).resolve())] or not near_torch


def test_a_function_that_does_not_exist_is_an_error(library: NativeLibrary) -> None:
    with pytest.raises(AttributeError, match=f"tramontane_{library.variant}_nothing"):
        library.function("nothing", ())


def test_this_process_loads_what_the_cpu_can_run(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library() is load_library()
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    load_library.cache_clear()
    loaded, best = load_library(), choose_variant(read_cpu_flags(), limit=None)
    load_library.cache_clear()
    assert isinstance(loaded, NativeLibrary) and isinstance(best, Variant)
    assert loaded.variant == best.name
