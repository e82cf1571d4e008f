"""Checks of the machine the command itself runs on: where MODEL is and whether ranks can share it, and if the HTTP port is free."""

import http.client
import shutil
import urllib.request
from pathlib import Path

from cluster.config.checkpoint_location import download_bytes, find_model
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.words import sentence_and_remedy, size
from cluster.system.net import check_port_is_free, url_of
from workers.config import load_model_config
from workers.errors import ConfigError

ANSWER_TIMEOUT_S = 3.0
PAGE_BYTES = 4096


def locate_model(model: str | None, revision: str | None) -> tuple[Path | None, list[Finding]]:
    """The checkpoint's folder if it is here; else what stands against it, or against its download."""
    try:
        folder = find_model(model, revision=revision)
    except ConfigError as e:
        return None, [problem("model", *sentence_and_remedy(e, otherwise="Check its name."))]
    if folder is not None:
        return folder, []
    assert model is not None, "without a name it is the demo model, which is here"
    return None, [_judge_download(model, revision)]


def _judge_download(model: str, revision: str | None) -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    try:
        num_bytes = download_bytes(model, revision=revision)
    except ConfigError as e:
        return problem("model", f"It is not here yet, and cannot be downloaded: {e}", "Put it right, or name a folder.")
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    room = f"{size(num_bytes)}, {size(free)} are free at {cache}"
    if free < num_bytes:
        return problem(
            "model", f"{model} has no room here: its download is {room}.", "Free some, or set HF_HOME to a larger disk."
        )
    remedy = f"`hf download {model}` does it beforehand, on every node that shall hold ranks."
    return warning("model", f"{model} is not here yet; the first start downloads it: {room}.", remedy)


def judge_division(folder: Path, tensor_parallel_size: int) -> list[Finding]:
    """Whether so many ranks can share the model; silent where the configuration itself is the trouble, which is found elsewhere."""
    try:
        config = load_model_config(folder)
    except ConfigError:
        return []
    try:
        config.check_tensor_parallel_size(tensor_parallel_size)
    except ConfigError as e:
        sentence, _, remedy = str(e).rpartition(". ")
        return [problem("model", f"{sentence}.", remedy)]
    return []


def judge_port(host: str, port: int) -> Finding:
    """Whether `serve` could listen there. One of ours that does already is no problem."""
    url = url_of(host, port)
    try:
        check_port_is_free(host, port)
    except ConfigError:
        if _is_tramontane(url):
            return ok("port", f"Port {port} is in use by a running Tramontane, at {url}.")
        remedy = f"Choose another with --port, or end what listens there: `ss -ltnp 'sport = :{port}'` names it."
        return problem("port", f"Port {port} on {host} is in use, or not for this user.", remedy)
    return ok("port", f"Port {port} on {host} is free for the HTTP endpoint.")


def _is_tramontane(url: str) -> bool:
    """By its page, which needs no key."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer:
            return b"<title>Tramontane" in answer.read(PAGE_BYTES)
    except (OSError, http.client.HTTPException):
        return False
