"""Whom the controller believes: counts of streams hold only once every gateway has seen the version of the view that they are about."""

from cluster.controller.gateway_table import GATEWAY_TIMEOUT_S, RETURN_S, GatewayTable
from cluster.protocol.report import GatewayReport


def report(gateway_id: str, *, replicas: dict[str, int] | None = None, adapters: dict[str, int] | None = None):
    return GatewayReport(
        gateway_id=gateway_id, url="http://g", streams_per_replica=replicas or {}, streams_per_adapter=adapters or {}
    )


def test_streams_of_a_draining_replica_are_known_once_every_gateway_has_seen_that_it_drains():
    table = GatewayTable(started_at=0.0)
    table.take(report("a", replicas={"r0": 2}), node_id="n", seen_version=6, now=1.0)
    table.take(report("b", replicas={"r0": 1}), node_id="n", seen_version=7, now=1.0)
    assert table.num_streams("r0") == 3
    table.note_version(7, draining=["r0"], retiring=[])
    assert table.num_streams("r0") is None, "a may still send requests there"
    assert table.num_streams("r1") == 0
    table.note_version(8, draining=["r0"], retiring=[])
    table.take(report("a"), node_id="n", seen_version=7, now=2.0)
    assert table.num_streams("r0") == 1, "it drains since version 7, not 8"


def test_streams_of_a_retiring_adapter_are_known_to_gateways_only_and_not_before_they_are_back():
    table = GatewayTable(started_at=0.0)
    table.note_version(5, draining=[], retiring=["x"])
    assert table.has_retiring
    later = RETURN_S + 0.1
    assert table.num_adapter_streams("x", version=5, now=later) is None, "no gateway has reported"
    table.take(report("a", adapters={"x": 1}), node_id="n", seen_version=5, now=1.0)
    assert table.num_adapter_streams("x", version=5, now=1.0) is None, "another gateway may not be back yet"
    assert table.num_adapter_streams("x", version=5, now=later) == 1
    assert table.num_adapter_streams("y", version=6, now=later) is None, "the view does not name it as retiring yet"


def test_a_gateway_that_is_silent_or_leaves_counts_no_more():
    table = GatewayTable(started_at=0.0)
    table.take(report("a"), node_id="n0", seen_version=1, now=0.0)
    table.take(report("b"), node_id="", seen_version=1, now=1.0)
    assert table.nodes() == {"n0"} and len(table) == 2
    table.drop_silent(GATEWAY_TIMEOUT_S + 0.5)
    assert [record.gateway_id for record in table.records()] == ["b"]
    table.remove("b")
    table.remove("b")
    assert not table and table.reports() == []
