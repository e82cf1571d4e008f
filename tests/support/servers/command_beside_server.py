"""Runs `tramontane batch` in this process, together with a server: its output, its exit code, and what the server has then."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.batch import run_there
from cluster.cli.main import main
from cluster.keys.keyring import Keyring
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica, tokens

KEY = "secret"
PROMPTS = [{"prompt": "a"}, {"prompt": "b", "custom_id": "mine"}]


class DiedError(BaseException):
    """Stands for a SIGKILL."""


class Command:
    """Runs `tramontane batch` against the server of the test."""

    def __init__(self, server: Any, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.server = server
        self.folder = folder
        self.url = str(server.make_url("")).rstrip("/")
        self.output = folder / "out.jsonl"
        self._capfd = capfd

    async def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """The exit code, stdout and stderr."""
        self._capfd.readouterr()
        code = await asyncio.to_thread(main, ["batch", *arguments])
        return code, *self._capfd.readouterr()

    async def run(self, source: Path | str, *options: str) -> tuple[int, str, str]:
        return await self("run", str(source), "-o", str(self.output), "--url", self.url, "--api-key", KEY, *options)

    def write(self, name: str, *rows: Any) -> Path:
        path = self.folder / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def answers(self, path: Path | None = None) -> dict[str, Any]:
        found = [json.loads(line) for line in (path or self.output).read_text().splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found), "a custom_id occurs twice"
        return {line["custom_id"]: line["response"] for line in found}

    async def on_the_server(self, what: str) -> list[dict[str, Any]]:
        response = await self.server.get(f"/v1/{what}", headers={"Authorization": f"Bearer {KEY}"})
        return (await response.json())["data"]


@contextlib.asynccontextmanager
async def command_beside_server(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Command]:
    """Yields a Command that polls quickly and keeps all its state under `folder`."""
    monkeypatch.setattr(run_there, "POLL_EVERY_S", 0.02)
    monkeypatch.setattr(run_there, "RETRY_S", 0.02)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    async with batch_app(folder / "data", [FakeReplica(tokens([42, 43]))], keyring=Keyring(api_key=KEY)) as server:
        work = folder / "work"
        work.mkdir()
        yield Command(server, work, capfd)
