"""Prices from the files of SkyPilot's catalog, or from the built-in table without them."""

import datetime
import logging
import os

import pytest
from support.cloud.sky_catalog import write_catalog

from cluster.plan.catalog import catalog_folder, known_offers
from cluster.plan.gpus import GPUS
from cluster.plan.offers import CLOUDS, OFFERS, find_offers


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    return tmp_path


def prices(offers):
    return {
        (o.cloud, o.instance_type, o.gpu, o.count): tuple(
            p and (pytest.approx(p.usd_per_hour), p.region) for p in (o.on_demand, o.spot)
        )
        for o in offers
    }


def test_without_skypilot_the_table_is_used(home):
    assert catalog_folder() is None
    assert known_offers() == tuple(o for cloud in CLOUDS for o in OFFERS if o.cloud == cloud)


def test_the_cheapest_type_and_region_of_each_gpu_and_count(home):
    write_catalog(home)
    assert prices(known_offers()) == {
        ("aws", "g5.xlarge", "A10G", 1): ((1.0, "us-east-1"), (0.4, "us-east-1")),
        ("aws", "g5.12xlarge", "A10G", 4): ((5.5, "us-east-1"), (2.0, "us-east-1")),
        ("aws", "p4d.24xlarge", "A100", 8): ((22.0, "us-east-1"), None),
        ("aws", "g6.xlarge", "L4", 1): ((0.81, "us-east-1"), (0.35, "us-east-1")),
        # The machine and its GPUs are two rows, and zones are not mixed.
        ("gcp", "a2-highgpu-1g", "A100", 1): ((3.75, "us-central1"), (1.25, "us-central1")),
        ("gcp", "a2-ultragpu-1g", "A100-80GB", 1): ((5.1, "us-central1"), (2.0, "us-central1")),
        ("gcp", "g2-standard-24", "L4", 2): ((2.2, "us-central1"), (0.55, "us-central1")),
        ("azure", "Standard_NC24ads_A100_v4", "A100-80GB", 1): ((3.7, "eastus"), (0.8, "eastus")),
    }


def test_what_has_no_price_yet_has_none(home):
    path = write_catalog(home) / "gcp" / "vms.csv"
    with path.open("a") as file:
        file.write("a4-highgpu-8g,224.0,3968.0,,,,us-central1,us-central1-b,0.0,0.0\n")
        file.write(",,,B200,8.0,B200,us-central1,us-central1-b,0.0,50.0\n")
    (offer,) = [o for o in known_offers() if o.gpu == "B200" and o.cloud == "gcp"]
    assert offer.on_demand is None
    assert offer.spot is not None and offer.spot.usd_per_hour == 50.0


def test_linux_on_azure_costs_by_the_gpu():
    """As Azure's own list does; with Windows each core costs more."""
    prices = {o.count: o.on_demand.usd_per_hour for o in OFFERS if o.cloud == "azure" and o.gpu == "A100-80GB"}
    assert prices == {1: 3.673, 2: 7.346, 4: 14.692}


def test_prices_are_as_old_as_the_file(home):
    folder = write_catalog(home)
    when = datetime.datetime(2026, 3, 4, tzinfo=datetime.UTC).timestamp()
    os.utime(folder / "aws" / "vms.csv", (when, when))
    offer = next(o for o in known_offers() if o.instance_type == "g5.xlarge")
    assert offer.on_demand is not None
    assert offer.on_demand.source.date == "2026-03-04"


def test_the_newest_version_is_used(home):
    folder = write_catalog(home)
    old = folder.parent / "v7"
    (old / "aws").mkdir(parents=True)
    (old / "aws" / "vms.csv").write_text("InstanceType\n")
    (folder.parent / "v10").mkdir()
    assert catalog_folder() == folder.parent / "v10"
    (folder.parent / "v10").rmdir()
    assert catalog_folder() == folder


@pytest.mark.parametrize("text", ["not,a,catalog\n1,2,3\n", "InstanceType,AcceleratorName\ng5.xlarge,A10G\n"])
def test_a_broken_file_is_named_and_the_table_is_used(home, caplog, text):
    path = write_catalog(home) / "aws" / "vms.csv"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        offers = known_offers()
    assert [o for o in offers if o.cloud == "aws"] == [o for o in OFFERS if o.cloud == "aws"]
    assert str(path) in caplog.text


def test_offers_are_exact_and_the_cheapest_comes_first():
    found = find_offers(OFFERS, "A100-80GB", 1, cloud=None, spot=False)
    assert [o.cloud for o in found] == ["azure", "gcp"]
    assert find_offers(OFFERS, "A10G", 2, cloud=None, spot=False) == []
    assert [o.cloud for o in find_offers(OFFERS, "A100-80GB", 1, cloud="gcp", spot=False)] == ["gcp"]
    by_spot = find_offers(OFFERS, "L4", 1, cloud=None, spot=True)
    assert [o.spot is None for o in by_spot] == [False, True]


def test_the_table_is_consistent():
    assert len({(o.cloud, o.gpu, o.count) for o in OFFERS}) == len(OFFERS)
    for offer in OFFERS:
        assert offer.gpu in GPUS
        for price in (offer.on_demand, offer.spot):
            assert price is None or (price.usd_per_hour > 0 and price.source.date <= "2026-11-24")
        if offer.on_demand and offer.spot:
            assert offer.spot.usd_per_hour < offer.on_demand.usd_per_hour
