"""What machines with these GPUs cost: an offer is an instance type of a cloud, on demand and spot, each price with its date and source.

A small table for machines without SkyPilot, all with Linux. If SkyPilot's catalog is on disk, it is newer and used instead (catalog.py).
Spot prices change every day; these show the order of magnitude. Knows no model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Cloud = Literal["aws", "gcp", "azure"]
CLOUDS: tuple[Cloud, ...] = get_args(Cloud)


@dataclass(frozen=True)
class Source:
    name: str
    date: str


RECEIPTS = Source("github.com/datareceipts/data-receipts, from the clouds' price lists", "2026-11-09")
SILYBENCH = Source("github.com/tgarg01/silybench-data, from Google's billing catalog", "2026-09-26")
# Rows of a copy of the catalog that SkyPilot hosts, at commit e385a0d348; the copy has no date.
SKYPILOT_COPY = Source("SkyPilot's hosted catalog v8, commit e385a0d348", "2025-26")
CYCLENERD = Source("github.com/Cyclenerd/google-cloud-pricing-cost-calculator", "2025-03-06")
LIST = Source("the cloud's list price as widely published, not looked up again", "2025")
AWS_LIST = Source("AWS's price list of US East and US West, as quoted in public repositories", "2026-07")
# What a cloud sells and Tramontane leaves out. The driver in Azure's image for its A10 sizes (vGPU slices) is refused by current hosts.
LEFT_OUT: frozenset[tuple[Cloud, str]] = frozenset({("azure", "A10")})


@dataclass(frozen=True)
class Price:
    usd_per_hour: float
    region: str
    source: Source


@dataclass(frozen=True, kw_only=True)
class Offer:
    """An instance type with `count` GPUs. A price is None if it is unknown or the machine is not sold that way."""

    cloud: Cloud
    instance_type: str
    gpu: str
    count: int
    on_demand: Price | None
    spot: Price | None

    def price(self, *, spot: bool) -> Price | None:
        return self.spot if spot else self.on_demand


def _offer(
    cloud: Cloud, instance_type: str, gpu: str, count: int, on_demand: Price | None, spot: Price | None = None
) -> Offer:
    return Offer(cloud=cloud, instance_type=instance_type, gpu=gpu, count=count, on_demand=on_demand, spot=spot)


def _a2(count: int) -> Offer:
    # Prices for two and four GPUs were looked up; the others follow, because Google charges per vCPU, memory and GPU.
    on_demand, spot = (Price(usd * count, "us-central1", CYCLENERD) for usd in (3.673385, 1.293355))
    return _offer("gcp", f"a2-highgpu-{count}g", "A100", count, on_demand, spot)


OFFERS = (
    _offer(
        "aws",
        "g5.xlarge",
        "A10G",
        1,
        Price(1.006, "us-east-1", SKYPILOT_COPY),
        Price(0.4591, "us-east-1", SKYPILOT_COPY),
    ),
    _offer(
        "aws",
        "g5.12xlarge",
        "A10G",
        4,
        Price(5.672, "us-east-1", SKYPILOT_COPY),
        Price(1.9046, "us-east-1", SKYPILOT_COPY),
    ),
    _offer(
        "aws",
        "g5.48xlarge",
        "A10G",
        8,
        Price(16.288, "us-east-1", SKYPILOT_COPY),
        Price(4.3302, "us-east-1", SKYPILOT_COPY),
    ),
    _offer(
        "aws",
        "g6.xlarge",
        "L4",
        1,
        Price(0.8048, "us-west-2", SKYPILOT_COPY),
        Price(0.4373, "us-west-2", SKYPILOT_COPY),
    ),
    _offer("aws", "g6.12xlarge", "L4", 4, Price(4.6016, "us-east-1", LIST)),
    _offer("aws", "g6.48xlarge", "L4", 8, Price(13.3504, "us-east-1", LIST)),
    _offer("aws", "g6e.xlarge", "L40S", 1, Price(1.861, "us-east-1", LIST)),
    _offer(
        "aws",
        "g6e.12xlarge",
        "L40S",
        4,
        Price(10.49264, "us-east-1", SKYPILOT_COPY),
        Price(2.7581, "us-east-2", SKYPILOT_COPY),
    ),
    _offer("aws", "g6e.48xlarge", "L40S", 8, Price(30.13118, "us-east-1", LIST)),
    _offer("aws", "p4d.24xlarge", "A100", 8, Price(21.957642, "us-east-1", RECEIPTS)),
    _offer("aws", "p4de.24xlarge", "A100-80GB", 8, Price(27.44705, "us-east-1", RECEIPTS)),
    _offer("aws", "p5.4xlarge", "H100", 1, Price(6.88, "us-west-2", AWS_LIST)),
    _offer("aws", "p5.48xlarge", "H100", 8, Price(55.04, "us-east-1", RECEIPTS)),
    _offer("aws", "p5en.48xlarge", "H200", 8, Price(63.296, "us-east-1", AWS_LIST)),
    _offer("aws", "p6-b200.48xlarge", "B200", 8, Price(113.9328, "us-east-1", AWS_LIST)),
    _offer("gcp", "g2-standard-4", "L4", 1, Price(0.7068, "us-central1", LIST)),
    _offer("gcp", "g2-standard-24", "L4", 2, Price(2.0008, "us-central1", LIST)),
    _offer("gcp", "g2-standard-48", "L4", 4, Price(4.0017, "us-central1", LIST)),
    _offer("gcp", "g2-standard-96", "L4", 8, Price(8.0033, "us-central1", LIST)),
    *map(_a2, (1, 2, 4, 8)),
    *(_offer("gcp", f"a2-ultragpu-{n}g", "A100-80GB", n, Price(5.0688 * n, "us-central1", LIST)) for n in (1, 2, 4, 8)),
    # Google sells machines with fewer than eight H100 as spot only.
    _offer("gcp", "a3-highgpu-1g", "H100", 1, None, Price(6.571, "us-central1", SILYBENCH)),
    _offer("azure", "Standard_NC24ads_A100_v4", "A100-80GB", 1, Price(3.673, "eastus", RECEIPTS)),
    _offer("azure", "Standard_NC48ads_A100_v4", "A100-80GB", 2, Price(7.346, "eastus", LIST)),
    _offer("azure", "Standard_NC96ads_A100_v4", "A100-80GB", 4, Price(14.692, "eastus", LIST)),
    _offer("azure", "Standard_ND96asr_v4", "A100", 8, Price(27.1968, "eastus", RECEIPTS)),
    # H100 NVL: 94 GB and 3.9 TB/s each, so `plan` counts less than there is.
    _offer("azure", "Standard_NC40ads_H100_v5", "H100", 1, Price(6.98, "eastus", LIST)),
    _offer("azure", "Standard_NC80adis_H100_v5", "H100", 2, Price(13.96, "eastus", LIST)),
    _offer("azure", "Standard_ND96isr_H100_v5", "H100", 8, Price(98.32, "eastus", LIST)),
)


def find_offers(offers: Iterable[Offer], gpu: str, count: int, *, cloud: Cloud | None, spot: bool) -> list[Offer]:
    """Machines with exactly `count` of that GPU, which is how SkyPilot searches; cheapest first, without a price last.

    spot: sort by spot price. An offer without one stays in the list, because the cloud may have one. On demand it does not: a machine
    without such a price is not sold that way.
    """

    def cost(offer: Offer) -> float:
        price = offer.price(spot=spot)
        return float("inf") if price is None else price.usd_per_hour

    found = [o for o in offers if o.gpu == gpu and o.count == count and cloud in (None, o.cloud)]
    return sorted((o for o in found if spot or o.on_demand is not None), key=cost)
