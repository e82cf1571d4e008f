"""Writes the SkyPilot YAML that rents what was planned: sky/serve.yaml, with the plan's machines, model and engine options in it.

That file is in the checkout; an installed package carries a copy. Knows no arithmetic.
"""

import shlex
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from cluster.plan.planner import Plan, Question
from workers.config import EngineConfig
from workers.errors import ConfigError

_MOUNTED_MODEL = "~/model"
_HEADER = """\
# {gpus} for {model}, {concurrency} requests at a time of up to {context:,} tokens: written by `tramontane plan`.
# It is sky/serve.yaml with these machines and options; that file says more. Launch it where the checkout is:
#
#   export HF_TOKEN=...                                # of an account that has accepted the model's terms on its Hub page
#   export TRAMONTANE_API_KEY=$(openssl rand -hex 32)  # what clients send; whoever has it can use the endpoint
#   sky launch -c tramontane {path} --secret HF_TOKEN --secret TRAMONTANE_API_KEY
#   sky down tramontane                                # ends the costs
"""


class _Dumper(yaml.SafeDumper):
    """Scripts stay readable: text of several lines is written as a literal block."""

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def write_task(path: Path, question: Question, plan: Plan) -> None:
    """Raises ConfigError if the file exists or cannot be written, or no cloud is known to have such machines."""
    task = make_task(question, plan)
    header = _HEADER.format(
        gpus=f"{plan.tensor_parallel_size} {plan.gpu.name}",
        model=question.model.name,
        concurrency=question.workload.concurrency,
        context=question.workload.context,
        path=shlex.quote(str(path)),
    )
    text = header + yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as e:
        raise ConfigError(f"{path} exists already; name another file, or remove it.") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be written ({e.strerror}); name a file in a folder that exists.") from e


def make_task(question: Question, plan: Plan) -> dict[str, Any]:
    """The task as SkyPilot reads it. Raises ConfigError if no cloud is known to have such machines."""
    if not plan.offers:
        raise ConfigError(
            f"No machine with exactly {plan.tensor_parallel_size} {plan.gpu.name} is known"
            + (f" on {question.cloud}" if question.cloud else "")
            + ", so there is nothing to write; leave --cloud out, or choose another GPU or --tensor-parallel-size."
        )
    task: dict[str, Any] = yaml.safe_load(_template().read_text(encoding="utf-8"))
    accelerators = f"{plan.gpu.name}:{plan.tensor_parallel_size}"
    spot = {"use_spot": True} if question.spot else {}
    task["resources"]["any_of"] = [{"infra": o.cloud, "accelerators": accelerators, **spot} for o in plan.offers]
    model = question.model
    task["envs"]["MODEL"] = model.name if model.folder is None else _MOUNTED_MODEL
    task["envs"]["SERVE_OPTIONS"] = " ".join(_serve_options(question))
    if model.folder is not None and model.checkpoint_bytes is not None:
        task["file_mounts"] = {_MOUNTED_MODEL: str(model.folder)}
        needed_gb = ceil(model.checkpoint_bytes / 1e9) + 64  # beside the system, the environment and its caches
        task["resources"]["disk_size"] = max(task["resources"]["disk_size"], needed_gb)
    return task


def _serve_options(question: Question) -> list[str]:
    """What `tramontane serve` has to be told to run as planned; the script passes the tensor-parallel size itself."""
    engine = question.engine(1)
    options = ["--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(engine.max_num_seqs)]
    if engine.max_num_batched_tokens != EngineConfig.max_num_batched_tokens:
        options += ["--max-num-batched-tokens", str(engine.max_num_batched_tokens)]
    if engine.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        options += ["--gpu-memory-utilization", f"{engine.gpu_memory_utilization:g}"]
    if engine.dtype != engine.model.dtype:
        options += ["--dtype", engine.dtype]
    if question.model.revision is not None:
        options += ["--revision", question.model.revision]
    if question.model.folder is not None:
        options += ["--served-model-name", question.model.folder.name.replace(" ", "-")]
    return options


def _template() -> Path:
    here = Path(__file__).resolve().parent
    for path in (here.parents[1] / "sky" / "serve.yaml", here / "serve.yaml"):
        if path.is_file():
            return path
    raise ConfigError("sky/serve.yaml is not part of this installation; install Tramontane again.")
