"""Which origins may send requests, and which security headers responses have."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.api.server import errors
from cluster.api.server.origin_guard import is_local
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
BODY = {"model": "demo", "prompt": "x", "max_tokens": 2}


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[TestClient]:
    app = make_app(
        router=Router([FakeReplica()]), tokenizer=TOKENIZER, chat_template=None, model_name="demo", **options
    )
    async with TestClient(TestServer(app)) as client:
        yield client


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("app.localhost:1", True),
        ("127.0.0.1:8000", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("localhost.", True),
        ("", False),
        ("evil.org", False),
        ("localhost.evil.org", False),
        ("127.0.0.1.evil.org", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("[::2]:1", False),
    ],
)
def test_local_names(host: str, expected: bool) -> None:
    assert is_local(host) is expected


async def test_a_server_without_a_key_is_reached_by_local_names_only() -> None:
    async with serving(local_only=True) as client:
        assert (await client.get("/v1/models")).status == 200
        response = await client.get("/v1/models", headers={"Host": "evil.org"})
        assert (response.status, (await response.json())["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("origin", ["https://evil.org", "null", "http://127.0.0.1:1"])
async def test_a_server_without_a_key_refuses_web_pages_of_other_origins(origin: str) -> None:
    async with serving() as client:
        response = await client.post("/v1/completions", json=BODY, headers={"Origin": origin})
        assert (response.status, (await response.json())["error"]["code"]) == (403, "origin_not_allowed")
        own = str(client.make_url("")).rstrip("/")
        response = await client.post("/v1/completions", json=BODY, headers={"Origin": own})
        assert response.status == 200
        assert "Access-Control-Allow-Origin" not in response.headers


PREFLIGHT = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}


async def test_cors_is_off_by_default() -> None:
    async with serving(api_key="k") as client:
        response = await client.options("/v1/completions", headers=PREFLIGHT)
        assert response.status == 401
        response = await client.get("/v1/models", headers={"Origin": "https://a.org", "Authorization": "Bearer k"})
        assert response.status == 200, "an Origin does no harm where cookies mean nothing"
        assert not [name for name in response.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("origins", [("https://a.org",), ("*",)])
async def test_cors_for_allowed_origins(origins: tuple[str, ...]) -> None:
    shown = "*" if "*" in origins else "https://a.org"
    async with serving(api_key="k", cors_origins=origins) as client:
        preflight = PREFLIGHT | {"Access-Control-Request-Headers": "authorization, x-stainless-os"}
        response = await client.options("/v1/completions", headers=preflight)
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, shown)
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        allowed = {name.strip().lower() for name in response.headers["Access-Control-Allow-Headers"].split(",")}
        assert {"authorization", "content-type", "x-stainless-os"} <= allowed
        for headers, status in (({}, 401), ({"Authorization": "Bearer k"}, 200)):
            response = await client.post("/v1/completions", json=BODY, headers=headers | {"Origin": "https://a.org"})
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (status, shown)
            assert response.headers["Vary"] == "Origin"
            assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
            assert "Access-Control-Allow-Credentials" not in response.headers
        stranger = {"Origin": "https://b.org", "Authorization": "Bearer k"}
        response = await client.get("/v1/models", headers=stranger)
        assert ("Access-Control-Allow-Origin" in response.headers) is (shown == "*")
        sneaky = PREFLIGHT | {"Access-Control-Request-Headers": "x: y;"}
        response = await client.options("/v1/completions", headers=sneaky)
        assert ";" not in response.headers["Access-Control-Allow-Headers"]


async def test_every_response_has_the_security_headers() -> None:
    async with serving(api_key="k") as client:
        for path in ("/", "/health/live", "/nowhere", "/v1/models"):
            response = await client.get(path, headers={"Authorization": "Bearer k"})
            assert response.headers["X-Content-Type-Options"] == "nosniff", path
            assert response.headers["Referrer-Policy"] == "no-referrer"
            assert response.headers["Server"] == "tramontane", "the version must not be shown"
            if "html" in response.headers["Content-Type"]:
                assert "default-src 'self'" in response.headers["Content-Security-Policy"]
                assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
            else:
                assert response.headers["Cache-Control"] == "no-store"


async def test_an_unexpected_exception_reveals_nothing(caplog: pytest.LogCaptureFixture) -> None:
    secrets = ("a user's prompt", "/home/me/key")
    try:
        try:
            raise KeyError(secrets[0])
        except KeyError as e:
            raise RuntimeError(secrets[1]) from e
    except RuntimeError as e:
        status, body = errors.describe(e)
    assert (status, body.code) == (500, "internal_error")
    for word in secrets:
        assert word not in body.message and word not in caplog.text
    assert "KeyError at" in caplog.text and "RuntimeError at" in caplog.text and "test_origin_guard.py" in caplog.text


def test_messages_are_short_even_for_huge_values() -> None:
    _, body = errors.describe(errors.RequestError("x" * 10**6))
    assert len(body.message) < 3000
