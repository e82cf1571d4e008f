"""What tests of engines share."""

import pytest
from support.fakes import engines


@pytest.fixture(params=[False, True], ids=["one by one", "overlap"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test without overlap and with it: for the engines that the test makes itself, and that say nothing about it."""
    overlap: bool = request.param
    monkeypatch.setitem(engines.SETTINGS, "overlap", overlap)
    return overlap
