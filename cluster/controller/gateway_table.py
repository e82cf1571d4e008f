"""The gateways of a deployment as the controller knows them: their last reports, and which version of the view each has seen.

Counts the streams that gateways have on a replica or with an adapter, and says when such a count can be trusted. Knows reports and
versions; no Ray and no clock: times are arguments, of one monotonic clock.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.protocol.report import GatewayReport
from cluster.protocol.view import GatewayRecord

log = logging.getLogger(__name__)

GATEWAY_TIMEOUT_S = 5.0
RETURN_S = 5.0  # by then the gateways of an earlier controller have reported to this one


@dataclass
class _Gateway:
    report: GatewayReport
    node_id: str
    seen_version: int
    last_seen: float


class GatewayTable:
    """started_at: when the controller did."""

    def __init__(self, *, started_at: float) -> None:
        self._started_at = started_at
        self._gateways: dict[str, _Gateway] = {}
        # Version of the view that first said so, by replica and by adapter's revision.
        self._draining: dict[str, int] = {}
        self._retiring: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._gateways)

    @property
    def has_retiring(self) -> bool:
        """Whether an adapter waits for its last streams."""
        return bool(self._retiring)

    def take(self, report: GatewayReport, *, node_id: str, seen_version: int, now: float) -> None:
        self._gateways[report.gateway_id] = _Gateway(report, node_id, seen_version, now)

    def remove(self, gateway_id: str) -> None:
        self._gateways.pop(gateway_id, None)

    def drop_silent(self, now: float) -> None:
        for gateway_id, gateway in list(self._gateways.items()):
            if now - gateway.last_seen > GATEWAY_TIMEOUT_S:
                log.warning(
                    "Gateway %s has not reported for %.0f s and is dropped.", gateway_id, now - gateway.last_seen
                )
                del self._gateways[gateway_id]

    def reports(self) -> list[GatewayReport]:
        return [g.report for g in self._gateways.values()]

    def nodes(self) -> set[str]:
        return {g.node_id for g in self._gateways.values() if g.node_id}

    def records(self) -> tuple[GatewayRecord, ...]:
        return tuple(
            GatewayRecord(
                gateway_id=g.report.gateway_id,
                url=g.report.url,
                node_id=g.node_id,
                num_running=g.report.num_running,
                num_queued=g.report.num_queued,
            )
            for g in self._gateways.values()
        )

    def note_version(self, version: int, *, draining: Iterable[str], retiring: Iterable[str]) -> None:
        """In this version of the view these replicas drain and these revisions retire. Gateways know it once they have seen the version."""
        self._draining = {r: self._draining.get(r, version) for r in draining}
        self._retiring = {r: self._retiring.get(r, version) for r in retiring}

    def num_streams(self, replica_id: str) -> int | None:
        """Streams on this replica over all gateways; None until every gateway has seen that it is draining."""
        since = self._draining.get(replica_id, 0)
        gateways = self._gateways.values()
        if any(g.seen_version < since for g in gateways):
            return None
        return sum(g.report.streams_per_replica.get(replica_id, 0) for g in gateways)

    def num_adapter_streams(self, revision_id: str, *, version: int, now: float) -> int | None:
        """Requests with this revision over all gateways; None until every gateway, and at least one, has seen that it retires.

        version: the view's.
        """
        since = self._retiring.get(revision_id, version)
        gateways = self._gateways.values()
        is_too_early = now - self._started_at < RETURN_S
        # Without a gateway nobody knows: one that is late, or the next one, may go on with a stream that has this revision.
        if is_too_early or not gateways or any(g.seen_version < since for g in gateways):
            return None
        return sum(g.report.streams_per_adapter.get(revision_id, 0) for g in gateways)
