"""When the kernels are compiled, what a missing or unfit compiler leads to, and that a failed build leaves no trace."""

import subprocess
from pathlib import Path

import pytest

from workers.native.build import BuildError, CompilerFailure, OtherPlatform, build, find_compiler, main, must_fail
from workers.native.variants import VARIANTS, is_current

SOURCE = """
extern "C" __attribute__((visibility("default"))) const char tramontane_mark[] = "TRAMONTANE_BUILD=" TRAMONTANE_BUILD_ID;
extern "C" __attribute__((visibility("default"))) int tramontane_vector() {
#ifdef __AVX512F__
    return 512;
#else
    return 256;
#endif
}
int hidden() { return tramontane_vector(); }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With one small source, and a compiler, or the test is skipped."""
    try:
        find_compiler()
    except BuildError as e:
        pytest.skip(str(e))
    (tmp_path / "small.cpp").write_text(SOURCE)
    return tmp_path


def test_only_what_is_not_current_is_compiled(folder: Path) -> None:
    assert build(folder) == list(VARIANTS)
    assert all(is_current(variant, folder) for variant in VARIANTS)
    assert build(folder) == []
    VARIANTS[0].library_path(folder).unlink()
    assert build(folder) == [VARIANTS[0]]
    (folder / "new.h").touch()
    assert build(folder) == list(VARIANTS)


def test_a_library_brings_no_openmp_runtime_and_shows_kernels_only(folder: Path) -> None:
    build(folder)
    path = str(VARIANTS[-1].library_path(folder))
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libgomp" not in needed, "torch brings the runtime"
    listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == {"tramontane_mark", "tramontane_vector"}


def test_a_source_that_does_not_compile_shows_the_compilers_words(folder: Path) -> None:
    build(folder)
    (folder / "small.cpp").write_text("this is not C++")
    with pytest.raises(CompilerFailure, match="The C\\+\\+ compiler failed") as e:
        build(folder)
    assert "small.cpp:1" in str(e.value)
    assert not any(is_current(variant, folder) for variant in VARIANTS), "the old libraries are outdated"
    assert sorted(p.suffix for p in folder.iterdir()) == [".cpp", *[".so"] * len(VARIANTS)]


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(no-such-compiler\).*apt-get install g\+\+") as e:
        find_compiler()
    assert not must_fail(e.value)
    monkeypatch.setenv("TRAMONTANE_REQUIRE_NATIVE", "1")
    assert must_fail(e.value)
    assert not must_fail(OtherPlatform()), "nothing on the machine could be changed"


@pytest.mark.parametrize("macros", ["#define __GNUC__ 9", "#define __GNUC__ 12\n#define __clang__ 1", ""])
def test_an_old_gcc_and_clang_are_refused(macros: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ncat <<'END'\n{macros}\nEND\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="need GCC 11 or newer"):
        find_compiler()


def test_another_platform_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(OtherPlatform, match="this is Linux on aarch64"):
        find_compiler()


def test_the_command_fails_only_if_the_kernels_are_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot_build() -> None:
        raise BuildError("There is no compiler. Install one.")

    monkeypatch.setattr("workers.native.build.build", cannot_build)
    monkeypatch.delenv("TRAMONTANE_REQUIRE_NATIVE", raising=False)
    assert main([]) == 0
    assert capsys.readouterr().err == "The kernels for CPUs are not compiled. There is no compiler. Install one.\n"
    monkeypatch.setenv("TRAMONTANE_REQUIRE_NATIVE", "1")
    assert main([]) == 1
