"""Shared by all tests: what runs where, and no network by accident."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: whoever waits for the suite learns early. Everything under tests/system is marked so."""
    for item in items:
        if "tests/system/" in item.nodeid:
            item.add_marker(pytest.mark.system)
    items.sort(key=lambda item: item.get_closest_marker("system") is not None)
