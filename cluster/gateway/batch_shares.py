"""Which of several models the running batches need, so that each deployment scales by its own lines.

A batch whose lines all name one model needs that one. What a batch with lines for several models needs shows when a line of it waits or
runs at a model's router; from then on it counts there until it ends. Knows served models and demands; no store and no lines.
"""

from collections.abc import Sequence

from cluster.api.served_model import ServedModel, find_model
from cluster.protocol.report import BatchDemand


class BatchShares:
    """Call `report` with all batches that this gateway runs. Each router then reports its own to its controller."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = tuple(models)
        self._seen: set[tuple[str, int]] = set()  # batch id and place of the model

    def report(self, running: Sequence[tuple[str | None, BatchDemand]]) -> None:
        """running: the model that all lines of a batch name, None for several, and what is left of it."""
        owners = [(None if name is None else find_model(self._models, name), demand) for name, demand in running]
        mixed = {demand.batch_id for owner, demand in owners if owner is None}
        used = {i for i, model in enumerate(self._models) if model.router.num_batch_sequences}
        self._seen = {(batch_id, i) for batch_id, i in self._seen if batch_id in mixed}
        self._seen |= {(batch_id, i) for batch_id in mixed for i in used}
        for i, model in enumerate(self._models):
            model.router.batches = tuple(
                demand
                for owner, demand in owners
                if owner is model or (owner is None and (demand.batch_id, i) in self._seen)
            )
