"""Keeps asking one machine's metadata service, and says whenever the answer to "does it go away?" has changed.

Knows a NoticeSource and patience: one failure is nothing, a service that stays silent is said once in the log, since a notice would be
missed. Returns at once where there is no cloud. Knows no nodes and no replicas.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from cluster.controller.preemption.metadata import MetadataError, NoticeSource, open_source
from cluster.controller.preemption.notices import CLOUD_NAMES, Notice, sooner
from cluster.controller.preemption.which_cloud import find_cloud
from cluster.protocol.notice import Cloud, PreemptionNotices

log = logging.getLogger(__name__)

RETRY_S = 2.0
SILENT_S = 30.0
_HINTS: dict[Cloud, str] = {
    "aws": "in a container, allow it two hops: aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2",
    "gcp": "169.254.169.254 has to be reachable from here",
    "azure": "169.254.169.254 has to be reachable from here",
}


def cloud_to_watch(asked: PreemptionNotices) -> Cloud | None:
    """Whose notices are to be expected on this machine."""
    if asked == "off":
        return None
    return find_cloud() if asked == "auto" else asked


class NoticeWatcher:
    """`await run()` in a task until cancelled. on_change: gets the notice there is now, None when it was withdrawn."""

    def __init__(
        self,
        cloud: Cloud,
        on_change: Callable[[Notice | None], None],
        *,
        open_source: Callable[[Cloud], NoticeSource] = open_source,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notice: Notice | None = None
        self._cloud = cloud
        self._on_change = on_change
        self._open_source = open_source
        self._clock = clock
        self._answered_at = clock()
        self._is_silent = False

    async def run(self) -> None:
        async with self._open_source(self._cloud) as source:
            is_first = True
            while True:
                try:
                    notice = await source.next(is_first=is_first)
                except MetadataError as e:
                    self._failed(e)
                    await asyncio.sleep(RETRY_S)
                    is_first = True  # what waited for a change may have missed it
                else:
                    self._heard(notice)
                    is_first = False

    def _heard(self, notice: Notice | None) -> None:
        self._answered_at = self._clock()
        if self._is_silent:
            self._is_silent = False
            log.warning("The metadata service of %s answers again.", CLOUD_NAMES[self._cloud])
        notice = sooner(self.notice, notice)
        if notice != self.notice:
            self.notice = notice
            self._on_change(notice)

    def _failed(self, error: MetadataError) -> None:
        silent_s = self._clock() - self._answered_at
        log.debug("The metadata service of %s %s.", CLOUD_NAMES[self._cloud], error)
        if silent_s > SILENT_S and not self._is_silent:
            self._is_silent = True
            log.warning(
                "The metadata service of %s has told nothing for %.0f s: it %s. A preemption notice would be missed; %s, or "
                "switch this off with --preemption-notices off.",
                CLOUD_NAMES[self._cloud], silent_s, error, _HINTS[self._cloud],
            )  # fmt: skip
