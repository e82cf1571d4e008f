"""Who is compared: our server and its peers, in each number format. Knows interpreters, commands and environments; measures nothing."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNNERS = Path(__file__).resolve().parent / "runners"
# An environment of its own for each, made by `make bench-peers`.
PEERS = ("vllm", "llama.cpp")
KV_CACHE_DTYPES = ("int8", "fp8")
FORMATS = {"F32": "float32", "BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int4"}


@dataclass(frozen=True)
class Subject:
    """engine: ours, vllm or llama.cpp. number_format: float32, bfloat16, int8, int4 (with groups of 32). kv_cache_dtype: as our option;
    "auto" for all others.
    """

    engine: str
    number_format: str
    python: Path
    kv_cache_dtype: str = "auto"

    @property
    def name(self) -> str:
        kv_cache = "" if self.kv_cache_dtype == "auto" else f", KV cache {self.kv_cache_dtype}"
        return f"{self.engine} {self.number_format}{kv_cache}"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.number_format.startswith("int") else self.number_format

    @property
    def quantization(self) -> str | None:
        return self.number_format if self.number_format.startswith("int") else None

    def runner(self) -> list[str]:
        script = {"ours": "ours.py", "vllm": "vllm_engine.py", "llama.cpp": "llama.py"}[self.engine]
        return [str(self.python), str(RUNNERS / script)]

    def model_path(self, folder: Path) -> str:
        if self.engine != "llama.cpp":
            return str(folder)
        (file_type,) = [key for key, value in FORMATS.items() if value == self.number_format]
        return str(folder / f"{file_type}.gguf")

    def server(self, folder: Path, *, port: int, tensor_parallel_size: int = 1) -> list[str]:
        """The command of an HTTP server. Raises ValueError for llama.cpp, which is compared in the process only."""
        common = ["--port", str(port), "--served-model-name", "m", "--dtype", self.dtype]
        common += ["--tensor-parallel-size", str(tensor_parallel_size)]
        if self.engine == "ours":
            command = [str(self.python), "-m", "cluster.cli.main", "serve", str(folder), *common]
            quantization = ["--quantization", self.quantization] if self.quantization else []
            return [*command, "--no-batches", "--no-prefix-caching", *quantization]
        if self.engine == "vllm":
            # The command `vllm` asks for the metadata of a package of this name, which the CPU build does not have.
            command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *common]
            command += ["--host", "127.0.0.1", "--max-model-len", "4096", "--max-num-seqs", "64"]
            return [
                *command,
                "--no-enable-prefix-caching",
                "--tokenizer-mode",
                "mistral",
                "--disable-uvicorn-access-log",
            ]
        raise ValueError(f"{self.engine} is not compared over HTTP.")

    def environment(self, *, serves: bool) -> dict[str, str]:
        """Each engine gets every core that this process may use. serves: for its HTTP server, not for the engine in one process."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        if self.engine == "vllm":
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            environment |= {
                # "auto" would leave one core to the HTTP server; with two cores that halves its speed.
                "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores),
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if serves else "0",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            }
            if (openmp := self.python.parents[1] / "lib" / "libiomp5.so").exists():
                # vLLM's documentation asks for Intel's OpenMP in LD_PRELOAD.
                environment["LD_PRELOAD"] = str(openmp)
        return environment


def subjects(*, vllm: Path, llama: Path) -> list[Subject]:
    """All of them, also those whose interpreter is not there: they become rows that say so."""
    ours, here = list(FORMATS.values()), Path(sys.executable)
    return [
        *(Subject("ours", number_format, here) for number_format in ours),
        *(Subject("ours", number_format, here, kv) for number_format in ours[:2] for kv in KV_CACHE_DTYPES),
        *(Subject("vllm", number_format, vllm) for number_format in ours[:2]),
        *(Subject("llama.cpp", number_format, llama) for number_format in ours),
    ]
