"""Compiles the kernels: `python -m workers.native.build`. One library per variant, next to the sources; only those that are not current.

Needs GCC 11 or newer (the variable CXX names another command than g++) on Linux on x86-64. Needs nothing outside Python's library,
because the build of a wheel runs it in an empty environment. Knows no kernel.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workers.native.variants import (
    COMMON_FLAGS,
    EXPORTS,
    FOLDER,
    VARIANTS,
    Variant,
    build_id,
    is_current,
    kernel_sources,
)

MIN_GCC = 11  # the first with -mamx-tile
REQUIRE = "TRAMONTANE_REQUIRE_NATIVE"
TIMEOUT_S = 300.0  # of one file


class BuildError(Exception):
    """The kernels cannot be compiled here. Two sentences: why, and what to do."""


class OtherPlatform(BuildError):
    """There are no kernels for this platform."""


class CompilerFailure(BuildError):
    """There is a compiler, and it failed. Its output follows the sentences on further lines."""


def build(folder: Path = FOLDER) -> list[Variant]:
    """Compiles the libraries that are not current, and returns their variants. Raises BuildError."""
    wanted = [variant for variant in VARIANTS if not is_current(variant, folder)]
    if not wanted:
        return []
    compiler = find_compiler()
    if not os.access(folder, os.W_OK):
        raise BuildError(f"The folder {folder} is read-only. Build the kernels as the user who installed Tramontane.")
    # Before the sources are read: what changes in the meantime makes the library outdated.
    identifiers = {variant: build_id(variant, folder) for variant in wanted}
    num_cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="tramontane-native-") as temp, ThreadPoolExecutor(num_cores) as pool:

        def compiled(variant: Variant, source: Path) -> Path:
            return _compile(compiler, variant, source, identifier=identifiers[variant], temp=Path(temp))

        objects = {v: [pool.submit(compiled, v, source) for source in kernel_sources(folder)] for v in wanted}
        try:
            for variant, parts in objects.items():
                _link(compiler, [part.result() for part in parts], variant.library_path(folder))
        finally:
            pool.shutdown(cancel_futures=True)
    return wanted


def must_fail(error: BuildError) -> bool:
    """Whether a build without the kernels is an error: they are required, and there are some for this platform."""
    return os.environ.get(REQUIRE, "") not in ("", "0") and not isinstance(error, OtherPlatform)


def find_compiler() -> list[str]:
    """The command that compiles C++. Raises BuildError where there is none that can build the kernels."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise OtherPlatform(
            f"The kernels are for Linux on x86-64, and this is {platform.system()} on {platform.machine()}. "
            "Use torch's own, as Tramontane does by itself."
        )
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"There is no C++ compiler ({command[0]}). Install GCC {MIN_GCC} or newer, on Debian and Ubuntu with "
            "`apt-get install g++`, then run `python -m workers.native.build`."
        )
    # Clang has an OpenMP runtime of its own, and the kernels use the one that torch has loaded.
    macros = _run([*command, "-x", "c++", "-dM", "-E", "/dev/null"]).split("\n")
    defined = {line.split()[1]: line.split()[-1] for line in macros if line.startswith("#define ")}
    if "__clang__" in defined or int(defined.get("__GNUC__", "0")) < MIN_GCC:
        raise BuildError(
            f"The kernels need GCC {MIN_GCC} or newer, and `{shlex.join(command)}` is another compiler. Install g++, or name it with CXX."
        )
    return command


def _compile(compiler: list[str], variant: Variant, source: Path, *, identifier: str, temp: Path) -> Path:
    output = temp / f"{source.stem}.{variant.name}.o"
    macros = (f"-DTRAMONTANE_ISA={variant.name}", f'-DTRAMONTANE_BUILD_ID="{identifier}"')
    _run([*compiler, *COMMON_FLAGS, *variant.compiler_flags, *macros, "-c", str(source), "-o", str(output)])
    return output


def _link(compiler: list[str], objects: Sequence[Path], library: Path) -> None:
    """Without -fopenmp, so that the library names no OpenMP runtime and gets the one that torch has loaded."""
    exports = objects[0].with_suffix(".map")
    exports.write_text(EXPORTS)
    # Next to the library and renamed, because a process may have loaded the old one.
    new = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        options = ("-shared", "-Wl,--as-needed", f"-Wl,--version-script={exports}")
        _run([*compiler, *options, *map(str, objects), "-o", str(new)])
        new.replace(library)
    finally:
        new.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CompilerFailure(f"The compiler does not run: {e}. Check CXX, or reinstall g++.") from e
    if done.returncode != 0:
        raise CompilerFailure(
            f"The C++ compiler failed. Its output follows.\n{shlex.join(command)}\n{done.stdout}{done.stderr}".rstrip()
        )
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the libraries are current, or there is no compiler for them and they are not required. 1: the compiler failed, or they are."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.native.build", description="Compiles the kernels for CPUs."
    )
    parser.epilog = f"Without a compiler it says so. {REQUIRE}=1 makes that an error."
    parser.parse_args(arguments)
    try:
        built = build()
    except BuildError as e:
        print(f"The kernels for CPUs are not compiled. {e}", file=sys.stderr)
        return 1 if must_fail(e) or isinstance(e, CompilerFailure) else 0
    if built:
        print(f"Compiled the kernels for CPUs: {', '.join(variant.name for variant in built)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
