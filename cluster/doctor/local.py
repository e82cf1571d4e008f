"""Checks that concern only the machine the command runs on: where the model is, how it can be split, and whether the HTTP port is free."""

import shutil
from pathlib import Path

import httpx

from cluster.config.checkpoint_location import download_bytes, find_model
from cluster.doctor.amounts import format_bytes
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.system.net import check_port_is_free, url_of
from workers.checkpoint.model_config import load_model_config
from workers.config import check_division
from workers.errors import CheckpointError, ConfigError

ANSWER_TIMEOUT_S = 3.0
PAGE_BYTES = 4096
BAD_MODEL_REMEDY = "Check the name of the model."


def locate_model(
    model: str | None, revision: str | None, gguf_file: str | None = None
) -> tuple[Path | None, list[Finding]]:
    """The checkpoint's folder, or its GGUF file, if it is on this machine; otherwise None and a finding about its name or its download."""
    try:
        folder = find_model(model, revision=revision, gguf_file=gguf_file)
    except ConfigError as e:
        return None, [problem("model", e.message, e.remedy or BAD_MODEL_REMEDY)]
    if folder is not None:
        return folder, []
    assert model is not None, "without a name it is the demo model, which is here"
    return None, [_judge_download(model, revision, gguf_file)]


def _judge_download(model: str, revision: str | None, gguf_file: str | None) -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    try:
        num_bytes = download_bytes(model, revision=revision, gguf_file=gguf_file)
    except ConfigError as e:
        message = f"{model} is not on this machine and cannot be downloaded: {e.message}"
        return problem("model", message, e.remedy or "Check its name and --revision, or name a folder.")
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    needed = f"{format_bytes(num_bytes)}; {format_bytes(free)} are free at {cache}"
    if free < num_bytes:
        remedy = "Free some space, or set HF_HOME to a folder on a larger disk."
        return problem("model", f"There is not enough disk space to download {model}: it needs {needed}.", remedy)
    files = "" if gguf_file is None else f" {gguf_file}"
    remedy = f"To download it now, run `hf download {model}{files}` on every node that will run ranks."
    return warning("model", f"{model} is not on this machine yet. The first start downloads {needed}.", remedy)


def judge_division(folder: Path, tensor_parallel_size: int) -> list[Finding]:
    """Whether the model can be split over that many ranks. Empty if so, and if the configuration cannot be read (another check says so)."""
    try:
        config = load_model_config(folder)
    except (ConfigError, CheckpointError):
        return []
    try:
        check_division(config, tensor_parallel_size)
    except ConfigError as e:
        return [problem("model", e.message, e.remedy or "Choose another --tensor-parallel-size.")]
    return []


def judge_port(host: str, port: int) -> Finding:
    """Whether `serve` can listen there. A Tramontane that already listens there is ok."""
    url = url_of(host, port)
    try:
        check_port_is_free(host, port)
    except ConfigError:
        if _is_tramontane(url):
            return ok("port", f"Port {port} is in use by a running Tramontane at {url}.")
        remedy = f"Choose another with --port, or stop the process that `ss -ltnp 'sport = :{port}'` shows."
        return problem("port", f"Port {port} on {host} is in use, or this user may not listen on it.", remedy)
    return ok("port", f"Port {port} on {host} is free for the HTTP endpoint.")


def _is_tramontane(url: str) -> bool:
    """Recognized by the title of its page, which needs no key."""
    start = b""
    try:
        # The address is this machine's own: HTTP_PROXY is for others.
        with httpx.stream("GET", url, timeout=ANSWER_TIMEOUT_S, follow_redirects=True, trust_env=False) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                start += chunk
                if len(start) >= PAGE_BYTES:
                    break
    except httpx.HTTPError:
        return False
    return b"<title>Tramontane" in start
