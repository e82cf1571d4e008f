"""Asks a cloud's metadata service, from inside one of its machines, whether that machine will be removed.

Knows addresses, headers, tokens and how often each cloud may be asked; notices.py interprets the answers. Every request is bounded, and
none goes through a proxy, because the address is local to the machine.
"""

import asyncio
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import aiohttp

from cluster.controller.preemption.notices import Notice, aws_notice, azure_notice, gcp_notice
from cluster.protocol.notice import Cloud

METADATA_URL = "http://169.254.169.254"
# Tests run outside a cloud and put another address here.
METADATA_URL_ENV = "TRAMONTANE_METADATA_URL"
REQUEST_TIMEOUT_S = 5.0
AZURE_TIMEOUT_S = 130.0  # the first request enables the service for the machine, which may take two minutes
AWS_INTERVAL_S = 5.0  # as AWS recommends
AZURE_INTERVAL_S = 2.0  # a preemption is announced 30 s ahead; more than one request a second is refused
GCP_WAIT_S = 10  # how long the service delays its answer while nothing changes
AWS_TOKEN_TTL_S = 21_600  # the longest that AWS allows
MAX_BYTES = 256 * 1024


class MetadataError(Exception):
    """No answer, or an invalid one. The message is a clause: "answered 500"."""


class NoticeSource(Protocol):
    """One cloud's service. Use as `async with`."""

    async def next(self, *, is_first: bool) -> Notice | None:
        """The current notice or None. Returns at once if `is_first`, else when it is time to ask again or the cloud reports a change.

        Raises MetadataError.
        """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class _Service:
    """A session with the service."""

    def __init__(self, url: str, *, headers: dict[str, str], timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._url = url
        self._headers = headers
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> Self:
        # trust_env stays False: HTTP_PROXY does not apply to this address.
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout, trust_env=False)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._session.close()

    async def _ask(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, params: dict[str, str] | None = None
    ) -> tuple[int, bytes, str]:
        """Status, body and ETag. Raises MetadataError."""
        try:
            async with self._session.request(
                method, self._url + path, headers=headers, params=params, allow_redirects=False
            ) as response:
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise MetadataError(f"sent more than {MAX_BYTES} bytes for {path}")
                return response.status, bytes(body), response.headers.get("ETag", "")
        except TimeoutError as e:
            raise MetadataError("did not answer in time") from e
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise MetadataError(f"cannot be reached ({type(e).__name__})") from e

    async def _get(self, path: str, **options: dict[str, str]) -> bytes:
        """The body of a 200. Raises MetadataError for anything else."""
        status, body, _ = await self._ask("GET", path, **options)
        if status != 200:
            raise MetadataError(f"answered {status} to {path}")
        return body


class AwsNotices(_Service):
    """IMDSv2: every request carries a token, which is fetched first, and again when it is refused."""

    _ACTION = "/latest/meta-data/spot/instance-action"
    _LIFECYCLE = "/latest/meta-data/autoscaling/target-lifecycle-state"

    def __init__(self, url: str) -> None:
        super().__init__(url, headers={})
        self._token: str | None = None

    async def next(self, *, is_first: bool) -> Notice | None:
        if not is_first:
            await asyncio.sleep(AWS_INTERVAL_S)
        action = await self._find(self._ACTION)
        lifecycle = await self._find(self._LIFECYCLE) if action is None else None
        return _parsed(lambda: aws_notice(action, lifecycle, now=time.time()))

    async def _find(self, path: str) -> bytes | None:
        """None for 404, which means that there is no notice."""
        for _ in range(2):
            if self._token is None:
                self._token = await self._new_token()
            status, body, _ = await self._ask("GET", path, headers={"X-aws-ec2-metadata-token": self._token})
            if status == 401:  # the token has expired, or the machine was restored from a snapshot
                self._token = None
            elif status == 200:
                return body
            elif status == 404:
                return None
            else:
                raise MetadataError(f"answered {status} to {path}")
        raise MetadataError("refuses the tokens that it issues")

    async def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
        status, body, _ = await self._ask("PUT", "/latest/api/token", headers=headers)
        token = body.decode("ascii", "replace").strip()
        if status != 200 or not token:
            raise MetadataError(f"answered {status} to the request for a token")
        return token


class GcpNotices(_Service):
    """The service delays its answer until something changes, so a preemption is known the moment it is decided."""

    _INSTANCE = "/computeMetadata/v1/instance"

    def __init__(self, url: str) -> None:
        super().__init__(url, headers={"Metadata-Flavor": "Google"}, timeout_s=GCP_WAIT_S + REQUEST_TIMEOUT_S)
        self._etag = "0"  # no known state: answered at once

    async def next(self, *, is_first: bool) -> Notice | None:
        waiting = {"wait_for_change": "true", "timeout_sec": str(GCP_WAIT_S), "last_etag": self._etag}
        path = f"{self._INSTANCE}/preempted"
        status, preempted, etag = await self._ask("GET", path, params=None if is_first else waiting)
        if status != 200:
            raise MetadataError(f"answered {status} to {path}")
        self._etag = etag or "0"
        maintenance = await self._get(f"{self._INSTANCE}/maintenance-event")
        if not etag and not is_first:
            await asyncio.sleep(1.0)  # without an ETag every request is answered at once
        return _parsed(lambda: gcp_notice(preempted.decode(), maintenance.decode(), now=time.time()))


class AzureNotices(_Service):
    """Scheduled Events. Every machine of a scale set gets those of all machines, so a machine first looks up its own name."""

    def __init__(self, url: str) -> None:
        super().__init__(url, headers={"Metadata": "true"}, timeout_s=AZURE_TIMEOUT_S)
        self._machine: str | None = None

    async def next(self, *, is_first: bool) -> Notice | None:
        if not is_first:
            await asyncio.sleep(AZURE_INTERVAL_S)
        if self._machine is None:
            params = {"api-version": "2021-02-01", "format": "text"}
            self._machine = (await self._get("/metadata/instance/compute/name", params=params)).decode().strip()
        machine = self._machine
        events = await self._get("/metadata/scheduledevents", params={"api-version": "2020-07-01"})
        return _parsed(lambda: azure_notice(events, machine=machine, now=time.time()))


_SOURCES: dict[Cloud, type[AwsNotices | GcpNotices | AzureNotices]] = {
    "aws": AwsNotices,
    "gcp": GcpNotices,
    "azure": AzureNotices,
}


def open_source(cloud: Cloud) -> NoticeSource:
    """The service of this cloud, at its own address unless METADATA_URL_ENV is set."""
    return _SOURCES[cloud](os.environ.get(METADATA_URL_ENV) or METADATA_URL)


def _parsed(read: Callable[[], Notice | None]) -> Notice | None:
    try:
        return read()
    except ValueError as e:
        raise MetadataError(f"sent an invalid answer ({e})") from e
