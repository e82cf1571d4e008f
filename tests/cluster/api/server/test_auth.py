"""What each key may do: the keys file next to the server's own key, limits and their headers, and the ledger afterwards."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.api.endpoints.table import ENDPOINTS
from cluster.keys.accounts import Accounts
from cluster.keys.file import add_key, revoke_key
from cluster.keys.key import Limits, new_key
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger, Sums, read_usage, totals
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
BODY: dict[str, Any] = {"model": "demo", "prompt": list(range(3, 13)), "max_tokens": 3}
PATH = "/v1/completions"


class Keys:
    """A keys file, and the headers for each key by its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, dict[str, str]] = {"own": {"Authorization": "Bearer own"}}

    def add(self, name: str, *, admin: bool = False, **limits: Any) -> str:
        key, secret = new_key(name, admin=admin, limits=Limits(**limits))
        add_key(self.path, key)
        self.headers[name] = {"Authorization": f"Bearer {secret}"}
        return key.id


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


@contextlib.asynccontextmanager
async def serving(
    keys: Keys, *, names: tuple[str, ...] = ("demo",), **replica: Any
) -> AsyncIterator[tuple[TestClient, FakeReplica]]:
    fake = FakeReplica(tokens([42, 43, 44]), **replica)
    ledger = Ledger(keys.path.with_suffix(".db"))
    app = make_app(
        router=Router([fake]),
        tokenizer=TOKENIZER,
        chat_template=None,
        model_name=names,
        keyring=Keyring(keys.path, api_key="own"),
        accounts=Accounts(clock=lambda: 0.0),
        ledger=ledger,
    )
    try:
        async with TestClient(TestServer(app)) as client:
            yield client, fake
    finally:
        await ledger.close()


async def error_of(response: Any) -> dict[str, Any]:
    return (await response.json())["error"]


async def test_every_path_but_the_open_ones_needs_a_key_and_some_an_admin_key(keys: Keys) -> None:
    keys.add("user")
    keys.add("admin", admin=True)
    opened = {"/health/live", "/", "/docs", "/static/none.js"}
    paths = {e.path.replace("{model:.+}", "demo").replace("{replica_id}", "r0"): e.method for e in ENDPOINTS}
    paths |= dict.fromkeys(opened, "GET") | {"/nowhere": "GET"}
    async with serving(keys) as (client, _):
        for path, method in paths.items():
            response = await client.request(method, path)
            assert (response.status == 401) is (path not in opened), path
            for name in ("user", "admin", "own"):
                response = await client.request(method, path, headers=keys.headers[name])
                is_admins = path.startswith(("/admin", "/debug")) or path == "/metrics" or "load_lora_adapter" in path
                assert response.status != 401
                assert (response.status == 403) is (is_admins and name == "user"), (name, path)
                if response.status == 403:
                    error = await error_of(response)
                    assert error["code"] == "admin_key_required"
                    assert error["message"].startswith("This endpoint requires an admin key.")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer own"}, 200),
        ({"Authorization": "bearer  own "}, 200),
        ({"X-Api-Key": "own"}, 200),
        ({"api-key": "own"}, 200),
        ({"x-api-key": "no"}, 401),
        ({"api-key": ""}, 401),
        # A bearer token wins, then x-api-key: exactly one key is tried.
        ({"Authorization": "Bearer own", "x-api-key": "no", "api-key": "no"}, 200),
        ({"Authorization": "Bearer no", "x-api-key": "own", "api-key": "own"}, 401),
        ({"x-api-key": "own", "api-key": "no"}, 200),
        ({"x-api-key": "no", "api-key": "own"}, 401),
        # No bearer token at all: some clients send an empty one, some proxies their own scheme.
        ({"Authorization": "Bearer ", "api-key": "own"}, 200),
        ({"Authorization": "Basic dTpw", "x-api-key": "own"}, 200),
        ({"Authorization": "Basic own"}, 401),
    ],
)
async def test_headers_that_carry_a_key(keys: Keys, headers: dict[str, str], status: int) -> None:
    keys.add("user")
    async with serving(keys) as (client, _):
        response = await client.get("/v1/models", headers=headers)
        assert response.status == status
        if status == 401:
            assert "api-key: KEY" in (await error_of(response))["message"]


async def test_a_key_may_use_its_models_only(keys: Keys) -> None:
    keys.add("user", models=("other",))
    async with serving(keys, names=("demo", "other")) as (client, _):
        for model, status, code in (
            ("demo", 403, "model_not_allowed"),
            ("nothing", 404, "model_not_found"),
            ("other", 200, ""),
        ):
            response = await client.post(PATH, json=BODY | {"model": model}, headers=keys.headers["user"])
            assert response.status == status
            if status != 200:
                error = await error_of(response)
                assert error["code"] == code
                assert code != "model_not_found" or error["message"].endswith("Use 'other'.")
            assert (await client.get(f"/v1/models/{model}", headers=keys.headers["user"])).status == status


@pytest.mark.parametrize(("requested", "expected"), [(None, 5), (-9, 5), (7, 7)])
async def test_priorities_are_clamped(keys: Keys, requested: int | None, expected: int) -> None:
    keys.add("user", priority=5)
    async with serving(keys) as (client, replica):
        await client.post(PATH, json=BODY | {"priority": requested}, headers=keys.headers["user"])
        assert replica.requests[0].priority == expected


async def test_requests_per_minute(keys: Keys) -> None:
    keys.add("user", requests_per_minute=2)
    async with serving(keys) as (client, replica):
        for left in (1, 0):
            response = await client.post(PATH, json=BODY, headers=keys.headers["user"])
            assert response.status == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        response = await client.post(PATH, json=BODY, headers=keys.headers["user"])
        assert (response.status, response.headers["Retry-After"]) == (429, "30")
        assert response.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert (await error_of(response))["code"] == "rate_limit_exceeded"
        assert (await client.get("/v1/models", headers=keys.headers["user"])).status == 200, "a GET costs nothing"
        assert (await client.post(PATH, json=BODY, headers=keys.headers["own"])).status == 200, (
            "other keys are not affected"
        )
        assert len(replica.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_per_minute(keys: Keys, stream: bool) -> None:
    keys.add("user", tokens_per_minute=20)
    async with serving(keys) as (client, replica):
        response = await client.post(PATH, json=BODY | {"stream": stream}, headers=keys.headers["user"])
        assert response.status == 200
        await response.read()
        response = await client.post(PATH, json=BODY, headers=keys.headers["user"])
        assert (response.status, response.headers["Retry-After"]) == (429, "9"), "13 of 20 are used and 10 are needed"
        assert response.headers["x-ratelimit-remaining-tokens"] == "7"
        assert len(replica.requests) == 1


async def test_concurrency(keys: Keys) -> None:
    keys.add("user", max_concurrency=1)
    async with serving(keys, hold_after=1) as (client, replica):
        first = await client.post(PATH, json=BODY | {"stream": True}, headers=keys.headers["user"])
        await replica.holding.wait()
        second = await client.post(PATH, json=BODY, headers=keys.headers["user"])
        assert (second.status, second.headers["Retry-After"]) == (429, "1")
        replica.release.set()
        await first.read()
        assert (await client.post(PATH, json=BODY, headers=keys.headers["user"])).status == 200


async def test_a_revoked_key_is_refused_and_its_running_requests_finish(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.keys.keyring.RELOAD_INTERVAL_S", 0.0)
    keys.add("user")
    async with serving(keys, hold_after=1) as (client, replica):
        running = await client.post(PATH, json=BODY | {"stream": True}, headers=keys.headers["user"])
        await replica.holding.wait()
        revoke_key(keys.path, "user")
        assert (await client.get("/v1/models", headers=keys.headers["user"])).status == 401
        replica.release.set()
        assert b"[DONE]" in await running.read()


async def test_the_ledger_has_every_request(keys: Keys) -> None:
    user = keys.add("user")
    async with serving(keys) as (client, _):
        for body in (BODY, BODY | {"stream": True}, BODY | {"n": 2}, BODY | {"model": "no"}, BODY | {"n": -1}):
            await (await client.post(PATH, json=body, headers=keys.headers["user"])).read()
        await client.post("/tokenize", json={"prompt": "x"}, headers=keys.headers["user"])
        await client.post(PATH, json=BODY, headers=keys.headers["own"])
        await client.post(PATH, json=BODY)
        await client.post("/nowhere", json=BODY, headers=keys.headers["user"])
    usage = read_usage(keys.path.with_suffix(".db"))
    assert totals(usage) == {user: Sums(6, 30, 3, 12, 2), "admin": Sums(1, 10, 1, 3, 0)}
    assert {(g.key_name, g.model, g.endpoint) for g, _ in usage} == {
        ("user", "demo", PATH),
        ("user", "", PATH),
        ("user", "", "/tokenize"),
        ("--api-key", "demo", PATH),
    }
