"""Which tasks of lm-eval are meant: `lm-eval:gsm8k`, a group such as `lm-eval:mmlu`, or `lm-eval:my_task.yaml`. Asks no model.

Needs the package lm-eval, which the extra `lm-eval` brings, and for a built-in task the network: datasets come from the Hugging Face Hub.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ConfigError

PREFIX = "lm-eval:"


@dataclass(frozen=True, kw_only=True)
class HarnessSuite:
    """name: of the suite in reports. loaded: lm-eval's own value, with its tasks."""

    name: str
    loaded: Any

    @property
    def tasks(self) -> dict[str, Any]:
        found: dict[str, Any] = self.loaded["tasks"]
        return found


def load_tasks(names: Sequence[str], *, num_fewshot: int | None = None) -> list[HarnessSuite]:
    """names: without the prefix. num_fewshot: examples before each question, instead of the task's own number. Raises ConfigError."""
    if not names:
        return []
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError(
            f"{PREFIX}{names[0]} needs the package lm-eval, which cannot be imported: {e}.",
            remedy="Install it with pip install 'tramontane[lm-eval]'.",
            param="SUITE",
        ) from e
    for noisy in ("lm_eval", "datasets", "evaluate", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # The index of thousands of built-in tasks takes seconds, and files need none.
    manager = TaskManager(include_defaults=not all(_is_file(name) for name in names))
    return [_load(manager, name, num_fewshot) for name in names]


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager: Any, name: str, num_fewshot: int | None) -> HarnessSuite:
    if _is_file(name) and not Path(name).is_file():
        raise ConfigError(f"There is no file {name}.", remedy="Check the path after lm-eval:.", param="SUITE")
    try:
        loaded = manager.load([name])
    except KeyError as e:
        raise ConfigError(
            f"lm-eval has no task {name!r}.", remedy="`lm-eval ls tasks` lists them.", param="SUITE"
        ) from e
    except (
        Exception
    ) as e:  # a task is a program of others: it may raise anything, above all where its data cannot be read
        raise ConfigError(
            f"The lm-eval task {name} cannot be loaded: {type(e).__name__}: {e}.",
            remedy="Check that its dataset can be reached, or is in the cache of Hugging Face.",
            param="SUITE",
        ) from e
    tasks: dict[str, Any] = loaded["tasks"]
    for task_name, task in tasks.items():
        for fault, reason in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "has images")):
            if getattr(task, fault, False):
                raise ConfigError(
                    f"The lm-eval task {task_name} {reason}, which `tramontane eval` does not do.",
                    remedy="Run it with lm-eval itself, whose model `local-completions` asks this server.",
                    param="SUITE",
                )
        own = task.get_config("num_fewshot")
        if own == 0 and num_fewshot:
            raise ConfigError(
                f"The lm-eval task {task_name} is made for no examples before its questions.",
                remedy="Leave --num-fewshot out.",
                param="--num-fewshot",
            )
        task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
    short = Path(name).stem if _is_file(name) else name
    return HarnessSuite(name=next(iter(tasks)) if len(tasks) == 1 else short, loaded=loaded)
