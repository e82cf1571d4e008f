"""Reads instance prices from SkyPilot's catalog on disk, ~/.sky/catalogs/vN/CLOUD/vms.csv, which it updates every few hours.

Reads the files, whose format is documented, instead of calling SkyPilot, which takes seconds to import and downloads what is missing. On
Google Cloud the price of a machine is the sum of its own row and the row of its GPUs. Knows no model.
"""

import csv
import logging
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cluster.plan.gpus import GPUS
from cluster.plan.offers import CLOUDS, LEFT_OUT, OFFERS, Cloud, Offer, Price, Source

log = logging.getLogger(__name__)

Row = dict[str, str]
_L4_HOSTS = {1: "g2-standard-4", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}
_GCP_FAMILIES = {
    "A100": "a2-highgpu",
    "A100-80GB": "a2-ultragpu",
    "H100": "a3-highgpu",
    "H200": "a3-ultragpu",
    "B200": "a4-highgpu",
}


def known_offers() -> tuple[Offer, ...]:
    """The offers of each cloud: from SkyPilot's catalog if it is on this machine, otherwise from the built-in table."""
    folder = catalog_folder()
    offers: list[Offer] = []
    for cloud in CLOUDS:
        path = None if folder is None else folder / cloud / "vms.csv"
        found = [] if path is None or not path.is_file() else read_catalog(path, cloud)
        offers += found or [o for o in OFFERS if o.cloud == cloud]
    return tuple(offers)


def catalog_folder() -> Path | None:
    """The folder of the newest catalog version; None if there is none."""
    root = Path(os.environ.get("SKY_RUNTIME_DIR") or Path.home()) / ".sky" / "catalogs"
    versions = [p for p in root.glob("v*") if p.is_dir() and re.fullmatch(r"v\d+", p.name)]
    return max(versions, key=lambda p: int(p.name[1:]), default=None)


def read_catalog(path: Path, cloud: Cloud) -> list[Offer]:
    """The cheapest instance type for each GPU and count, in its cheapest regions. Empty if the file cannot be read."""
    date = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
    source = Source("SkyPilot's catalog on this machine", date)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(_with_hosts(list(csv.DictReader(file))) if cloud == "gcp" else csv.DictReader(file))
        return _cheapest(rows, cloud, source)
    except (OSError, ValueError, KeyError, csv.Error) as e:
        log.warning("SkyPilot's catalog %s cannot be read (%s). Prices come from the built-in table.", path, e)
        return []


def _cheapest(rows: list[Row], cloud: Cloud, source: Source) -> list[Offer]:
    by_type: dict[tuple[str, int, str], Offer] = {}
    for row in rows:
        if row["AcceleratorName"] not in GPUS or not row["InstanceType"] or (cloud, row["AcceleratorName"]) in LEFT_OUT:
            continue
        key = row["AcceleratorName"], int(float(row["AcceleratorCount"])), row["InstanceType"]
        seen = by_type.get(key)
        by_type[key] = Offer(
            cloud=cloud,
            instance_type=key[2],
            gpu=key[0],
            count=key[1],
            on_demand=_lower(seen.on_demand if seen else None, row, "Price", source),
            spot=_lower(seen.spot if seen else None, row, "SpotPrice", source),
        )
    best: dict[tuple[str, int], Offer] = {}
    for (gpu, count, _), offer in by_type.items():
        other = best.get((gpu, count))
        if other is None or _cost(offer) < _cost(other):
            best[gpu, count] = offer
    return list(best.values())


def _lower(seen: Price | None, row: Row, column: str, source: Source) -> Price | None:
    usd = float(row[column] or 0)
    if not usd > 0:  # a machine that the catalog lists before it knows its price
        return seen
    price = Price(usd, row["Region"], source)
    return price if seen is None or price.usd_per_hour < seen.usd_per_hour else seen


def _cost(offer: Offer) -> list[float]:
    return [float("inf") if p is None else p.usd_per_hour for p in (offer.on_demand, offer.spot)]


def _with_hosts(rows: list[Row]) -> Iterator[Row]:
    """The rows of GPUs, each with the machine that hosts them and the price of both together."""
    hosts = {(r["InstanceType"], r["AvailabilityZone"]): r for r in rows if r["InstanceType"]}
    for row in rows:
        if row["InstanceType"] or row["AcceleratorName"] not in GPUS:
            continue
        host_type = _gcp_host(row["AcceleratorName"], int(float(row["AcceleratorCount"])))
        host = hosts.get((host_type or "", row["AvailabilityZone"]))
        if host_type is not None and host is not None:
            prices = {name: _sum(row[name], host[name]) for name in ("Price", "SpotPrice")}
            yield {**row, **prices, "InstanceType": host_type}


def _gcp_host(gpu: str, count: int) -> str | None:
    if gpu == "L4":
        return _L4_HOSTS.get(count)
    return f"{_GCP_FAMILIES[gpu]}-{count}g" if gpu in _GCP_FAMILIES else None


def _sum(a: str, b: str) -> str:
    return str(float(a) + float(b)) if a and b else ""
