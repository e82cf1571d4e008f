"""Which hosting platform runs this container, and what it wants: port, paths, model. A pure function of the environment.

Knows the published contracts of Amazon SageMaker, Vertex AI, Hugging Face Inference Endpoints and Baseten. Each of them authenticates
callers before they reach the container and offers no way to send a key of ours, so without a key the server listens there for everyone.
Knows no option table and no HTTP. Replicate runs a predictor of its own next to a server on the loopback address (deploy/replicate).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from workers.errors import ConfigError

PlatformName = Literal["sagemaker", "vertex", "huggingface", "baseten"]
PLATFORMS: tuple[PlatformName, ...] = get_args(PlatformName)
PLATFORM_ENV = "TRAMONTANE_PLATFORM"
SM_OPTION = "SM_TRAMONTANE_"
_HUB_MODEL = "HF_MODEL_ID"  # SageMaker's and Hugging Face's own containers call it so


@dataclass(frozen=True, kw_only=True)
class Platform:
    """`evidence`: what in the environment names it. `model`: a folder, the address of a bucket or a Hub id; None: the command says it.

    `ready_path`, `predict_path`: what it calls besides /ping and /invocations. `options`: of `serve`, as the environment gives them.
    """

    name: PlatformName
    title: str
    evidence: str
    port: int
    model: str | None = None
    ready_path: str | None = None
    predict_path: str | None = None
    options: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """What `serve` is called with here, before the user's own options, which win."""
        return ["--host", "0.0.0.0", "--port", str(self.port), "--public-health", *self.options]

    def __str__(self) -> str:
        paths = [f"POST {p}" for p in ("/invocations", self.predict_path) if p]
        paths += [f"GET {p}" for p in ("/ping", self.ready_path) if p]
        return f"{self.title} ({self.evidence}): {', '.join(dict.fromkeys(paths))}"


def recognize(
    environ: Mapping[str, str], *, asked: str = "auto", has_files: Callable[[str], bool] = lambda _: False
) -> Platform | None:
    """asked: "auto", "none" or a platform's name. has_files: whether this folder exists and is not empty. Raises ConfigError."""
    if asked == "none":
        return None
    name, evidence = (asked, f"--platform {asked}") if asked != "auto" else _evidence(environ, has_files)
    match name:
        case "sagemaker":
            return _sagemaker(environ, evidence, has_files)
        case "vertex":
            return Platform(
                name="vertex",
                title="Vertex AI",
                evidence=evidence,
                port=_port(environ, "AIP_HTTP_PORT", default=8080),
                model=environ.get("AIP_STORAGE_URI") or environ.get(_HUB_MODEL) or None,
                ready_path=_path(environ, "AIP_HEALTH_ROUTE"),
                predict_path=_path(environ, "AIP_PREDICT_ROUTE"),
            )
        case "huggingface":
            folder = "/repository"
            return Platform(
                name="huggingface",
                title="Hugging Face Inference Endpoints",
                evidence=evidence,
                port=_port(environ, "PORT", default=8000),
                model=folder if has_files(folder) else environ.get(_HUB_MODEL) or None,
                ready_path="/health",
            )
        case "baseten":
            return Platform(
                name="baseten", title="Baseten", evidence=evidence, port=_port(environ, "PORT", default=8000)
            )
    return None


def _evidence(environ: Mapping[str, str], has_files: Callable[[str], bool]) -> tuple[str, str]:
    """Name of the platform and what shows it; "" if nothing does. A notebook or a training job of SageMaker serves nobody."""
    options = sorted(name for name in environ if name.startswith(SM_OPTION))
    for variable in ("SAGEMAKER_BIND_TO_PORT", *options):
        if environ.get(variable):
            return "sagemaker", f"{variable} is set"
    if environ.get("AIP_HTTP_PORT") and environ.get("AIP_PREDICT_ROUTE"):
        return "vertex", "AIP_HTTP_PORT is set"
    if has_files("/opt/ml/model") and not environ.get("SM_TRAINING_ENV") and not environ.get("TRAINING_JOB_NAME"):
        return "sagemaker", "there is /opt/ml/model"
    if has_files("/repository"):
        return "huggingface", "there is /repository"
    return "", ""


def _sagemaker(environ: Mapping[str, str], evidence: str, has_files: Callable[[str], bool]) -> Platform:
    folder = environ.get("SM_MODEL_DIR") or "/opt/ml/model"
    options: list[str] = []
    if environ.get("SM_NUM_GPUS"):
        options += ["--tensor-parallel-size", environ["SM_NUM_GPUS"]]
    for name in sorted(environ):
        value = environ[name].strip()
        if name.startswith(SM_OPTION) and name != f"{SM_OPTION}MODEL" and value.lower() not in ("", "false"):
            flag = f"--{name.removeprefix(SM_OPTION).lower().replace('_', '-')}"
            options += [flag] if value.lower() == "true" else [flag, value]
    named = environ.get(f"{SM_OPTION}MODEL") or environ.get(_HUB_MODEL)
    return Platform(
        name="sagemaker",
        title="Amazon SageMaker",
        evidence=evidence,
        port=_port(environ, "SAGEMAKER_BIND_TO_PORT", default=8080),
        model=named or (folder if has_files(folder) else None),
        options=tuple(options),
    )


def _port(environ: Mapping[str, str], variable: str, *, default: int) -> int:
    text = environ.get(variable) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise ConfigError(f"{variable} is {text!r}, which is not a port.", remedy="Set it to 1 to 65535.")
    return int(text)


def _path(environ: Mapping[str, str], variable: str) -> str | None:
    path = environ.get(variable)
    if not path:
        return None
    if not path.startswith("/") or any(c in path for c in "{}?# "):
        raise ConfigError(f"{variable} is {path!r}, which is not a path.", remedy="Write it like /predict.")
    return path.rstrip("/") or "/"
