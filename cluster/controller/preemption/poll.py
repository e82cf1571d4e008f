"""Polls one machine's metadata service, and calls back whenever its preemption notice changes.

Knows a NoticeSource and when to retry: a single failure is ignored; a service that stays silent is logged once, since a notice would be
missed. Knows no nodes and no replicas.
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
    "aws": "In a container, allow two hops: aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2",
    "gcp": "Make 169.254.169.254 reachable from here",
    "azure": "Make 169.254.169.254 reachable from here",
}


def cloud_to_watch(option: PreemptionNotices) -> Cloud | None:
    """The cloud whose notices this machine may get; None for none. option: `--preemption-notices`."""
    if option == "off":
        return None
    return find_cloud() if option == "auto" else option


class NoticePoller:
    """`await run()` in a task until cancelled. on_change: called with the current notice, or None when it was withdrawn."""

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
                    self._handle_failure(e)
                    await asyncio.sleep(RETRY_S)
                    is_first = True  # the failed request may have missed a change
                else:
                    self._handle_answer(notice)
                    is_first = False

    def _handle_answer(self, notice: Notice | None) -> None:
        self._answered_at = self._clock()
        if self._is_silent:
            self._is_silent = False
            log.warning("The metadata service of %s is answering again.", CLOUD_NAMES[self._cloud])
        notice = sooner(self.notice, notice)
        if notice != self.notice:
            self.notice = notice
            self._on_change(notice)

    def _handle_failure(self, error: MetadataError) -> None:
        silent_s = self._clock() - self._answered_at
        log.debug("The metadata service of %s %s.", CLOUD_NAMES[self._cloud], error)
        if silent_s > SILENT_S and not self._is_silent:
            self._is_silent = True
            log.warning(
                "The metadata service of %s has not answered for %.0f s: it %s. A preemption notice would be missed. %s, or "
                "turn this off with --preemption-notices off.",
                CLOUD_NAMES[self._cloud], silent_s, error, _HINTS[self._cloud],
            )  # fmt: skip
