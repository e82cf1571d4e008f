"""lm-eval's `local-completions` on the tasks next to this folder, through its Python API: the command line would first index
all built-in tasks. The tokenizer is transformers' (`huggingface`), or the server's own (`remote`).

Prints a JSON object for each backend that is asked for: scores by task, and the server's response to each document."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = ("tramontane_choices", "tramontane_endings", "tramontane_files")


def tokenizer_args(backend: str) -> dict[str, str]:
    if backend == "remote":
        return {"tokenizer_backend": backend, "auth_token": os.environ["TRAMONTANE_API_KEY"]}
    return {"tokenizer_backend": backend, "tokenizer": os.environ["TRAMONTANE_TOKENIZER"]}


def main(batch_size: int, *backends: str) -> None:
    folder = Path(__file__).parents[1] / "lm_eval_task"
    os.chdir(folder)  # the tasks name their files relative to it
    print()
    for backend in backends:
        print(json.dumps(evaluate(folder, batch_size, backend), default=str))


def evaluate(folder: Path, batch_size: int, backend: str) -> dict[str, Any]:
    results = simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": os.environ["TRAMONTANE_URL"] + "/v1/completions",
            "model": "demo_model",
            **tokenizer_args(backend),
            "max_length": 1024,
            "max_retries": 1,
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {
        task: [
            [resp[0] for resp in sample["resps"]]
            for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])
        ]
        for task in TASKS
    }
    return {"scores": results["results"], "samples": samples}


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
