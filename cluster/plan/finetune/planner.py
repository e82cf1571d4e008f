"""Plans of fine-tuning: one for each GPU and form of the base, those that fit and cost least first. Pure: values in, values out."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.plan.finetune.memory import Training, TrainingMemory, tokens_per_s, training_memory
from cluster.plan.gpus import GPUS, Gpu
from cluster.plan.models import PlannedModel
from cluster.plan.offers import Cloud, Offer, Price, find_offers
from workers.config import Quantization
from workers.device.memory import gigabytes
from workers.errors import ConfigError

FORMS: tuple[Quantization | None, ...] = (None, "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """offer: the cheapest machine with one such GPU, at `price`; None where none is known."""

    gpu: Gpu
    quantization: Quantization | None
    memory: TrainingMemory
    tokens_per_s: float
    offer: Offer | None
    price: Price | None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.memory_bytes

    @property
    def usd_per_million_tokens(self) -> float | None:
        return None if self.price is None else self.price.usd_per_hour / (self.tokens_per_s * 3600) * 1e6

    @property
    def options(self) -> str:
        """Of the recipe."""
        return "" if self.quantization is None else f" --quantize {self.quantization}"


def make_finetune_plans(
    model: PlannedModel,
    training: Training,
    *,
    gpus: Sequence[Gpu] = tuple(GPUS.values()),
    forms: Sequence[Quantization | None] = FORMS,
    offers: Iterable[Offer] = (),
    cloud: Cloud | None = None,
    spot: bool = False,
) -> list[FinetunePlan]:
    """The recommended one first: of those that fit, the least rounded form on the cheapest GPU. Raises ConfigError for a model of which a
    quantised checkpoint cannot be trained.
    """
    stored = model.config.stored
    if stored is not None and stored.method != "gguf":
        raise ConfigError(
            f"{model.name} is quantized already, and the recipe trains beside plain weights or its own int8 and int4.",
            remedy="Plan with the model that it was made from, and --quantization int4.",
            param="MODEL",
        )
    config = replace(model.config, stored=None)  # transformers makes plain numbers of a GGUF file
    offers = tuple(offers)
    plans = []
    for gpu, form in itertools.product(gpus, forms):
        found = find_offers(offers, gpu.name, 1, cloud=cloud, spot=spot)
        priced = next(((offer, price) for offer in found if (price := offer.price(spot=spot)) is not None), None)
        plans.append(
            FinetunePlan(
                gpu=gpu,
                quantization=form,
                memory=training_memory(config, training, form),
                tokens_per_s=tokens_per_s(config, gpu),
                offer=None if priced is None else priced[0],
                price=None if priced is None else priced[1],
            )
        )

    def rank(plan: FinetunePlan) -> tuple[bool, bool, float, int]:
        cost = float("inf") if plan.price is None else plan.price.usd_per_hour
        return not plan.fits, plan.offer is None, cost, forms.index(plan.quantization)

    return sorted(plans, key=rank)


def finetune_refusal(model: PlannedModel, training: Training, plans: Sequence[FinetunePlan]) -> ConfigError:
    """Why none fits, and what would."""
    closest = min(plans, key=lambda p: p.memory.total - p.gpu.memory_bytes)
    remedies = []
    for size in range(training.batch_size - 1, 0, -1):
        smaller = Training(rank=training.rank, batch_size=size, max_length=training.max_length)
        if (
            training_memory(replace(model.config, stored=None), smaller, closest.quantization).total
            <= closest.gpu.memory_bytes
        ):
            remedies.append(f"--batch-size {size}")
            break
    others = [p for p in make_finetune_plans(model, training) if p.fits]
    if others:
        smallest = min(others, key=lambda p: (p.gpu.memory_bytes, FORMS.index(p.quantization)))
        form = "" if smallest.quantization is None else f" --quantization {smallest.quantization}"
        remedies.append(f"--gpu {smallest.gpu.name}{form}")
    return ConfigError(
        f"Fine-tuning {model.name} with {training.batch_size} x {training.max_length:,} tokens at a time does not fit on one "
        f"{closest.gpu.name}: it needs {gigabytes(closest.memory.total)} of its {gigabytes(closest.gpu.memory_bytes)}.",
        remedy=f"Use {' or '.join(remedies)}." if remedies else "Use a smaller model.",
    )
