"""The routers of one gateway, one for each model: closed, opened and ended as one. Knows routers."""

from collections.abc import Sequence

from cluster.router.router import Router


class Routers:
    """Methods do to all of them what they do to one, see Router."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = tuple(routers)

    @property
    def num_inflight_requests(self) -> int:
        return sum(router.num_inflight_requests for router in self._routers)

    def close(self, reason: str, *, admits: bool = False) -> None:
        for router in self._routers:
            router.close(reason, admits=admits)

    def reopen(self) -> None:
        for router in self._routers:
            router.reopen()

    def end_streams(self, error: Exception) -> int:
        """Returns how many it ended."""
        return sum(router.end_streams(error) for router in self._routers)
