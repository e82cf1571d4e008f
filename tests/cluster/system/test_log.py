"""What a log line says, as text and as JSON."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from cluster.system.log import JsonFormatter, TextFormatter, log_prompt, request_id_var, setup_logging


@pytest.fixture(params=[TextFormatter, JsonFormatter])
def sink(request: pytest.FixtureRequest) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    logger = logging.getLogger("test_log.sink")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, stream
    logger.removeHandler(handler)


async def test_lines_carry_the_request_of_their_own_task(sink: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = sink

    async def serve(request_id: str) -> None:
        request_id_var.set(request_id)
        await asyncio.sleep(0)  # the other task sets its own in between
        logger.warning("serving %s", request_id)

    await asyncio.gather(*(asyncio.create_task(serve(name)) for name in ("cmpl-a", "cmpl-b")))
    logger.warning("of no request")
    lines = stream.getvalue().splitlines()
    for line, name in zip(lines, ("cmpl-a", "cmpl-b"), strict=False):
        carries = json.loads(line)["request_id"] == name if line.startswith("{") else line.endswith(f"[{name}]")
        assert carries, f"the line of request {name} does not say so: {line}"
    assert "cmpl" not in lines[2] and "request_id" not in lines[2], "a line of no request carries one"


def test_json_lines_are_one_object_each_whatever_the_message() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("test_log.json")
    logger.addHandler(handler)
    logger.propagate = False
    message = 'two\nlines, "quotes", \\ and \x1b[31m 火'
    logger.warning("%s", message)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it %s", "failed")
    logger.warning("GET /%s", "\udcff")  # a path of bytes that are not UTF-8
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["level"], first["logger"]) == (message, "warning", "test_log.json")
    assert datetime.now(UTC) - datetime.fromisoformat(first["ts"]) < timedelta(minutes=1), "ts is in UTC"
    assert second["message"] == "it failed"
    assert second["exception"].endswith("ValueError: broken") and "Traceback" in second["exception"]
    assert "exception" not in first
    assert third["message"] == "GET /\\udcff"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_setup_sends_ours_at_the_level_and_the_rest_at_warnings(log_format: str) -> None:
    code = (
        "import logging; from cluster.system.log import setup_logging\n"
        f"setup_logging('info', format={log_format!r})\n"
        "logging.getLogger('cluster.x').info('ours'); logging.getLogger('workers.x').debug('too much')\n"
        "logging.getLogger('aiohttp').info('theirs'); logging.getLogger('aiohttp').warning('their trouble')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == "", "logs belong on stderr"
    assert [("ours" in line, "their trouble" in line) for line in lines] == [(True, False), (False, True)], done.stderr
    assert all(line.startswith("{") == (log_format == "json") for line in lines), done.stderr


@pytest.mark.parametrize("level", ["debug", "error"])
def test_prompts_are_logged_only_when_asked(level: str, caplog: pytest.LogCaptureFixture) -> None:
    try:
        for prompts in (False, True):
            setup_logging(level, prompts=prompts)  # type: ignore[arg-type]
            caplog.clear()
            log_prompt("my secret")
            assert ("my secret" in caplog.text) is prompts
    finally:
        setup_logging("warning")
