"""Writes the SkyPilot YAML for a plan: sky/serve.yaml with the plan's machines, model and engine options, or for several replicas
sky/cluster.yaml.

These files are in the checkout, and an installed package has copies. Knows no arithmetic.
"""

import shlex
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from cluster.plan.planner import Plan, Question
from workers.checkpoint.gguf.gguf_file import SUFFIX, model_name, part_names
from workers.config import EngineConfig
from workers.errors import ConfigError

_MOUNTED_MODEL = "~/model"
_HEADER = """\
# {gpus} for {model}, {concurrency} requests at a time of up to {context:,} tokens. Written by `tramontane plan`.
# This is sky/{template} with these machines and options; see that file for more. Launch it from the root of the checkout:
#
#   export HF_TOKEN=...                                # from an account that has accepted the model's terms on the Hub
#   export TRAMONTANE_API_KEY=$(openssl rand -hex 32)  # what clients send; anyone who has it can use the endpoint
{more}#   sky launch -c tramontane {path} --secret HF_TOKEN --secret TRAMONTANE_API_KEY{secrets}
#   sky down tramontane                                # stops the costs
"""


class _Dumper(yaml.SafeDumper):
    """Writes text with several lines as a literal block, so that scripts stay readable."""

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def write_task(path: Path, question: Question, plan: Plan) -> None:
    """Raises ConfigError if the file exists or cannot be written, or if no cloud is known to have such machines."""
    task = make_task(question, plan)
    several = plan.num_replicas > 1
    gpus = f"{plan.tensor_parallel_size} {plan.gpu.name}"
    header = _HEADER.format(
        gpus=f"{plan.num_replicas} nodes with {gpus}" if several else gpus,
        template=_template_name(plan),
        more="#   export RAY_AUTH_TOKEN=$(openssl rand -hex 32)      # controls the whole cluster\n" if several else "",
        secrets=" --secret RAY_AUTH_TOKEN" if several else "",
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
        raise ConfigError(
            f"{path} already exists.", remedy="Choose another file, or remove it.", param="--write"
        ) from e
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be written: {e.strerror}.", remedy="Choose a file in an existing folder.", param="--write"
        ) from e


def make_task(question: Question, plan: Plan) -> dict[str, Any]:
    """The task as SkyPilot reads it. Raises ConfigError if no cloud is known to have such machines, or to sell them that way."""
    if not plan.offers:
        how = "" if question.spot else " with a price on demand"
        more = [] if question.spot else ["add --spot"]
        more += ["remove --cloud"] if question.cloud else []
        raise ConfigError(
            f"No machine with exactly {plan.tensor_parallel_size} {plan.gpu.name} is known"
            + (f" on {question.cloud}{how}." if question.cloud else f"{how}."),
            remedy=", or ".join(["Choose another --gpu or --tensor-parallel-size", *more]) + ".",
            param="--write",
        )
    task: dict[str, Any] = yaml.safe_load(_template(_template_name(plan)).read_text(encoding="utf-8"))
    if plan.num_replicas > 1:
        task["num_nodes"] = plan.num_replicas
    accelerators = f"{plan.gpu.name}:{plan.tensor_parallel_size}"
    spot = {"use_spot": True} if question.spot else {}
    task["resources"]["any_of"] = [{"infra": o.cloud, "accelerators": accelerators, **spot} for o in plan.offers]
    model = question.model
    mounts = {} if model.folder is None else _mounts(model.folder)
    task["envs"]["MODEL"] = next(iter(mounts), model.name)
    task["envs"]["SERVE_OPTIONS"] = " ".join(_serve_options(question, plan))
    if model.folder is not None and model.checkpoint_bytes is not None:
        task["file_mounts"] = mounts
        needed_gb = ceil(model.checkpoint_bytes / 1e9) + 64  # plus room for the system, the environment and its caches
        task["resources"]["disk_size"] = max(task["resources"]["disk_size"], needed_gb)
    return task


def _mounts(location: Path) -> dict[str, str]:
    """{path there: path here}, the model's path first. Of a GGUF file, all of its parts."""
    if location.suffix != SUFFIX:
        return {_MOUNTED_MODEL: str(location)}
    return {f"{_MOUNTED_MODEL}/{name}": str(location.with_name(name)) for name in part_names(location.name)}


def _serve_options(question: Question, plan: Plan) -> list[str]:
    """The options for `tramontane serve` to run as planned. The script itself passes the tensor-parallel size, and the ranks choose the
    tokens of a step for their GPU as the plan does.
    """
    engine = question.engine(plan.tensor_parallel_size, plan.gpu)
    options = ["--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(plan.memory.num_sequences)]
    if engine.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        options += ["--gpu-memory-utilization", f"{engine.gpu_memory_utilization:g}"]
    if engine.dtype != engine.model.dtype:
        options += ["--dtype", engine.dtype]
    if engine.quantization is not None:
        options += ["--quantization", engine.quantization]
    if engine.kv_cache_dtype != "auto":
        options += ["--kv-cache-dtype", engine.kv_cache_dtype]
    if engine.enable_lora:
        options += ["--enable-lora", "--max-loras", str(engine.max_loras), "--max-lora-rank", str(engine.max_lora_rank)]
    if question.model.revision is not None:
        options += ["--revision", question.model.revision]
    if question.model.folder is None and question.model.gguf_file is not None:
        options += ["--gguf-file", question.model.gguf_file]
    if question.model.folder is not None:
        options += ["--served-model-name", model_name(question.model.folder).replace(" ", "-")]
    return options


def _template_name(plan: Plan) -> str:
    return "serve.yaml" if plan.num_replicas == 1 else "cluster.yaml"


def _template(name: str) -> Path:
    here = Path(__file__).resolve().parent
    for path in (here.parents[1] / "sky" / name, here / name):
        if path.is_file():
            return path
    raise ConfigError(f"sky/{name} is not part of this installation.", remedy="Install Tramontane again.")
