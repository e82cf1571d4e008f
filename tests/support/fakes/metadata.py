"""Fake metadata services of AWS, Google Cloud and Azure for preemption notices. They refuse what the real ones refuse, and can fail.

Use `FakeMetadata(...)` in the process of a test. As a program it can run at the clouds' own address inside a network namespace; requests
to /fake/announce and /fake/withdraw then set the notice.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from email.utils import formatdate

from aiohttp import web

MACHINE = "gpu-worker_7"
OTHER_MACHINE = "gpu-worker_8"


class FakeMetadata:
    """The service of one machine. `broken`: if set, the answer to every request. `delay_s`: before each answer. `asked`: the paths."""

    def __init__(self, cloud: str) -> None:
        self.cloud = cloud
        self.broken: web.Response | None = None
        self.delay_s = 0.0
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.lifecycle_state: str | None = None
        self.maintenance_event = "NONE"
        self.events_of_others: list[dict] = []
        self._deadline: float | None = None
        self._num_changes = 0
        self._changed = asyncio.Event()

    def announce(self, grace_s: float) -> None:
        """The machine will be removed in `grace_s`. Google Cloud states no time; there it is always 30 s."""
        self.change(time.time() + grace_s)

    def withdraw(self) -> None:
        self.change(None)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._check])
        app.add_routes(
            [
                web.put("/latest/api/token", self._token),
                web.get("/latest/meta-data/spot/instance-action", self._instance_action),
                web.get("/latest/meta-data/autoscaling/target-lifecycle-state", self._lifecycle),
                web.get("/computeMetadata/v1/instance/preempted", self._preempted),
                web.get("/computeMetadata/v1/instance/maintenance-event", self._maintenance),
                web.get("/metadata/instance/compute/name", self._name),
                web.get("/metadata/scheduledevents", self._scheduled_events),
                web.post("/fake/announce", self._set_notice),
                web.post("/fake/withdraw", self._set_notice),
            ]
        )
        return app

    def change(self, deadline: float | None) -> None:
        """Sets the deadline, None for no notice, and answers the long polls."""
        self._deadline = deadline
        self._num_changes += 1
        self._changed.set()
        self._changed = asyncio.Event()

    @web.middleware
    async def _check(self, request: web.Request, handler) -> web.StreamResponse:
        if not request.path.startswith("/fake/"):
            self.asked.append(request.path)
            await asyncio.sleep(self.delay_s)
            if self.broken is not None:
                return web.Response(status=self.broken.status, text=self.broken.text)
            prefix = {"aws": "/latest/", "gcp": "/computeMetadata/", "azure": "/metadata/"}[self.cloud]
            if not request.path.startswith(prefix):
                raise web.HTTPNotFound
            if "X-Forwarded-For" in request.headers:  # the real services refuse requests through a proxy
                raise web.HTTPForbidden
        return await handler(request)

    async def _set_notice(self, request: web.Request) -> web.Response:
        if request.path.endswith("announce"):
            self.announce((await request.json())["grace_s"])
        else:
            self.withdraw()
        return web.Response(status=204)

    # AWS

    async def _token(self, request: web.Request) -> web.Response:
        if not 1 <= int(request.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21_600:
            raise web.HTTPBadRequest
        token = f"AQAEA{len(self.tokens)}=="
        self.tokens.add(token)
        return web.Response(text=token)

    def _check_token(self, request: web.Request) -> None:
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            raise web.HTTPUnauthorized

    async def _instance_action(self, request: web.Request) -> web.Response:
        self._check_token(request)
        if self._deadline is None:
            raise web.HTTPNotFound
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._deadline))
        return web.Response(text=json.dumps({"action": "terminate", "time": at}))

    async def _lifecycle(self, request: web.Request) -> web.Response:
        self._check_token(request)
        if self.lifecycle_state is None:
            raise web.HTTPNotFound
        return web.Response(text=self.lifecycle_state)

    # Google Cloud

    async def _preempted(self, request: web.Request) -> web.Response:
        if request.headers.get("Metadata-Flavor") != "Google":
            raise web.HTTPForbidden
        if request.query.get("wait_for_change") == "true" and request.query.get("last_etag") == self._etag:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(float(request.query.get("timeout_sec", "3600"))):
                    await self._changed.wait()
        text = "FALSE" if self._deadline is None else "TRUE"
        return web.Response(text=text, headers={"ETag": self._etag, "Metadata-Flavor": "Google"})

    @property
    def _etag(self) -> str:
        return f"e{self._num_changes:015x}"

    async def _maintenance(self, request: web.Request) -> web.Response:
        if request.headers.get("Metadata-Flavor") != "Google":
            raise web.HTTPForbidden
        return web.Response(text=self.maintenance_event)

    # Azure

    def _check_azure(self, request: web.Request) -> None:
        if request.headers.get("Metadata") != "true" or "api-version" not in request.query:
            raise web.HTTPBadRequest

    async def _name(self, request: web.Request) -> web.Response:
        self._check_azure(request)
        return web.Response(text=MACHINE)

    async def _scheduled_events(self, request: web.Request) -> web.Response:
        self._check_azure(request)
        events = [*self.events_of_others]
        if self._deadline is not None:
            events.append(azure_event("Preempt", MACHINE, formatdate(self._deadline, usegmt=True)))
        return web.json_response({"DocumentIncarnation": self._num_changes, "Events": events})


def azure_event(kind: str, machine: str, not_before: str, *, status: str = "Scheduled") -> dict:
    """An event as in Azure's documentation."""
    return {
        "EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123",
        "EventStatus": status,
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": [machine],
        "NotBefore": not_before,
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }


@contextlib.asynccontextmanager
async def serving(fake: FakeMetadata, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Runs the service and yields its URL."""
    runner = web.AppRunner(fake.app(), shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0]
        yield f"http://{bound[0]}:{bound[1]}"
    finally:
        await runner.cleanup()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cloud", choices=("aws", "gcp", "azure"))
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    async with serving(FakeMetadata(args.cloud), host=args.host, port=args.port) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
