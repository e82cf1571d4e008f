"""Builds the CUDA device that computes nothing: one shared library under the names of all of NVIDIA's libraries that torch asks for.

    python build_device.py FOLDER       # then start a process with LD_LIBRARY_PATH=FOLDER

What device/*.cpp defines does something. Every other symbol that torch needs gets a function that returns 0 and notes its name. Knows the
files of torch and Triton (whose headers it uses), and neither imports them.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent / "device"
NVIDIAS = re.compile(r"(__)?cuda|cu[A-Z]|cublas|cudnn|cufft|curand|cusolver|cusparse|cupti|nccl|nvshmem|nvrtc|nvJit")
LIBRARY = "libfakecuda.so"


def build_device(folder: Path) -> Path:
    """Compiles into `folder` and returns it. Raises CalledProcessError with the compiler's words in `stderr`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch, include = _package("torch"), _package("triton") / "backends" / "nvidia" / "include"
    libraries = [*sorted((torch / "lib").glob("*.so*")), *torch.glob("_C*.so")]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        # The headers declare most functions without what -fvisibility would add; -w, because that is what the compiler warns of.
        _run("g++", "-std=c++17", "-O1", "-fPIC", "-w", f"-I{include}", "-c", source, "-o", objects[-1])
    defined = set().union(*(_symbols("--defined-only", o) for o in objects))
    needed = set().union(*(_symbols("--undefined-only", library) for library in libraries))
    stubs = folder / "stubs.c"
    stubs.write_text(
        "void fake_note_unknown(const char *);\n"
        + "".join(
            f'int {name}(void) {{ fake_note_unknown("{name}"); return 0; }}\n'
            for name in sorted(needed - defined)
            if NVIDIAS.match(name)
        )
    )
    _run("gcc", "-O1", "-fPIC", "-w", "-c", stubs, "-o", stubs.with_suffix(".o"))
    _run("g++", "-shared", *objects, stubs.with_suffix(".o"), f"-Wl,-soname,{LIBRARY}", "-o", folder / LIBRARY)
    for name in {"libcuda.so.1"}.union(*(_nvidia_libraries(library) for library in libraries)):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(LIBRARY)
    return folder


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed"
    return Path(spec.origin).parent


def _symbols(which: str, library: Path) -> set[str]:
    dynamic = ["-D"] if ".so" in library.name else []
    lines = _run("nm", *dynamic, which, library).splitlines()
    # "                 U cudaMalloc@libcudart.so.13"
    return {line.split()[-1].split("@")[0] for line in lines if line.split()[-2:-1] != ["w"]}


def _nvidia_libraries(library: Path) -> set[str]:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-d", library))
    return {name for name in needed if re.match(r"lib(cu|nccl|nv)", name)}


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    try:
        print(build_device(Path(sys.argv[1])))
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
