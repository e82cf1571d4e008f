"""Runs a suite of lm-eval's tasks on one model, and turns what it scored into answers and numbers as of any other suite.

A task has one or more metrics: one of them is the suite's, by default the first; the others stand in the report. If its values are all
0 or 1, as of `acc` and `exact_match`, documents are right or wrong, with Wilson's interval and McNemar's test. Otherwise the suite has
lm-eval's mean, or its value for the whole task, such as a perplexity, with lm-eval's standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.eval.harness.lm import Asking, ServedLM, Stopped
from cluster.eval.harness.tasks import HarnessSuite
from cluster.eval.journal import Answer
from cluster.eval.model import TextModel
from cluster.eval.scores import Mean, mean
from workers.errors import ConfigError, RequestError, TramontaneError

BOOTSTRAP_ITERS = 1000  # of standard errors for which there is no formula
FEWSHOT_SEED = 1234  # lm-eval's


@dataclass(kw_only=True)
class Scored:
    """means: of the suites whose answers are neither right nor wrong. more: every number that lm-eval gives, by suite."""

    answers: list[Answer] = field(default_factory=list)
    means: dict[str, Mean] = field(default_factory=dict)
    more: dict[str, dict[str, Any]] = field(default_factory=dict)


def score_suites(
    suites: Sequence[HarnessSuite],
    model: TextModel,
    asking: Asking,
    *,
    max_items: int | None = None,
    metric: str | None = None,
) -> Scored:
    """max_items: of each task. metric: as lm-eval writes it, such as "acc_norm" or "exact_match,strict-match".

    Suites that the user stopped are left out. Raises ConfigError for a metric that a task has not, RequestError where a task fails.
    """
    from lm_eval.evaluator import evaluate  # late: the package is optional, and takes seconds to import

    whole = Scored()
    for suite in suites:
        for task in suite.tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        lm = ServedLM(model, asking)
        try:
            found = evaluate(lm=lm, task_dict=suite.loaded, limit=max_items, bootstrap_iters=BOOTSTRAP_ITERS)
        except Stopped:
            continue
        except TramontaneError:
            raise
        except Exception as e:  # a task is a program of others
            raise RequestError(
                f"The lm-eval task {suite.name} failed: {type(e).__name__}: {e}.",
                remedy="The answers are kept. Correct or leave out the task.",
            ) from e
        _add(whole, suite, found, lm, metric)
    return whole


def _add(whole: Scored, suite: HarnessSuite, found: dict[str, Any], lm: ServedLM, metric: str | None) -> None:
    chosen = {name: _choose(name, found["samples"][name], metric) for name in suite.tasks}
    values = {
        (name, sample["doc_id"]): (sample[chosen[name][0]], sample)
        for name in suite.tasks
        for sample in found["samples"][name]
        if sample["filter"] == chosen[name][1]
    }
    is_judged = all(isinstance(value, bool | int | float) and value in (0, 1) for value, _ in values.values())
    for (name, doc_id), (value, sample) in values.items():
        is_number = isinstance(value, bool | int | float)
        item = f"{suite.name}/{doc_id}" if len(suite.tasks) == 1 else f"{suite.name}/{name}/{doc_id}"
        asked = lm.answers[name, doc_id]
        error = next((a.error for a in asked if a.error is not None), None)
        whole.answers.append(
            Answer(
                key=asked[0].key,
                model=asked[0].model,
                item=item,
                text=_shown(sample, asked),
                passed=is_judged and error is None and bool(value),
                score=float(value) if is_number and not is_judged and error is None else None,
                prompt_tokens=sum(a.prompt_tokens for a in asked),
                output_tokens=sum(a.output_tokens for a in asked),
                seconds=sum(a.seconds for a in asked),
                error=error,
            )
        )
    whole.more[suite.name] = {
        name: {key: value for key, value in results.items() if isinstance(value, int | float)}
        for name, results in found["results"].items()
    } | {"metric": sorted({f"{name},{filter_}" for name, filter_ in chosen.values()})}
    if not is_judged:
        _add_mean(whole, suite, found, chosen)


def _add_mean(whole: Scored, suite: HarnessSuite, found: dict[str, Any], chosen: dict[str, tuple[str, str]]) -> None:
    """lm-eval's own value of a single task; of several, the mean over all documents."""
    mine = [a for a in whole.answers if a.item.startswith(f"{suite.name}/")]
    if errors := [a.error for a in mine if a.error is not None]:
        raise RequestError(
            f"{len(errors)} documents of the lm-eval task {suite.name} have no answer: {errors[0].rstrip('.')}.",
            remedy="The same command asks them again.",
        )
    directions = {
        bool(found.get("higher_is_better", {}).get(name, {}).get(metric, True)) for name, (metric, _) in chosen.items()
    }
    scores = [a.score for a in mine if a.score is not None]
    if len(chosen) == 1:
        ((name, (metric, filter_)),) = chosen.items()
        results = found["results"][name]
        error = results.get(f"{metric}_stderr,{filter_}")
        whole.means[suite.name] = Mean(
            float(results[f"{metric},{filter_}"]),
            float(error) if isinstance(error, int | float) else None,
            len(mine),
            is_more_better=directions == {True},
        )
    elif len(scores) == len(mine) and len(directions) == 1:
        whole.means[suite.name] = mean(scores, is_more_better=directions == {True})
    else:
        raise ConfigError(
            f"The tasks of {suite.name} have no common metric.",
            remedy="Name them one by one, or a metric that all have with --metric.",
            param="--metric",
        )


def _choose(task: str, samples: list[dict[str, Any]], metric: str | None) -> tuple[str, str]:
    """(metric, filter). Raises ConfigError."""
    known = list(dict.fromkeys((name, sample["filter"]) for sample in samples for name in sample["metrics"]))
    if metric is None:
        return known[0]
    name, _, filter_ = metric.partition(",")
    for one in known:
        if one[0] == name and filter_ in ("", one[1]):
            return one
    raise ConfigError(
        f"The lm-eval task {task} has no metric {metric!r}.",
        remedy=f"Use one of {'; '.join(','.join(one) for one in known)}.",
        param="--metric",
    )


def _shown(sample: dict[str, Any], asked: Sequence[Answer]) -> str:
    """What was generated, or each text with its log-likelihood; then the target."""
    lines = [a.text if a.logprob is None else f"{a.logprob:.3f} {a.text!r}" for a in asked]
    return "\n".join([*lines, f"[target: {sample['target']}]"])
