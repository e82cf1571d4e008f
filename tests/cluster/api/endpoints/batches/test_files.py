"""/v1/files with a store and a folder: forms, refused uploads that leave nothing, pages, and who sees which files."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica
from support.servers.live_replica import TOKENIZER

from cluster.api.app import make_app
from cluster.batch.files import FileContents
from cluster.keys.file import add_key
from cluster.keys.key import new_key
from cluster.keys.keyring import Keyring
from cluster.router.router import Router

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "x"}}\n'


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[TestClient]:
    async with batch_app(tmp_path, [FakeReplica()], runs=False) as client:
        yield client


def form(*fields: tuple[str, Any], filename: str | None = "in.jsonl", content: Any = LINE) -> aiohttp.FormData:
    """A form with these fields in this order; the field named "file" gets the content."""
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields:
        if name == "file":
            data.add_field("file", content, filename=filename)
        else:
            data.add_field(name, value)
    return data


PLAIN = (("purpose", "batch"), ("file", None))


async def upload(client: TestClient, data: aiohttp.FormData | None = None, **options: Any) -> dict[str, Any]:
    response = await client.post("/v1/files", data=data or form(*PLAIN), **options)
    answer = await response.json()
    assert response.status == 200, answer
    return answer


def contents(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "files").iterdir())


@pytest.mark.parametrize("fields", [PLAIN, PLAIN[::-1]], ids=["purpose first", "file first"])
async def test_a_file_is_uploaded_downloaded_and_deleted(
    client: TestClient, tmp_path: Path, fields: tuple[Any, ...]
) -> None:
    made = await upload(client, form(*fields))
    assert (made["object"], made["bytes"], made["filename"], made["purpose"]) == (
        "file",
        len(LINE),
        "in.jsonl",
        "batch",
    )
    assert made["expires_at"] is None
    path = f"/v1/files/{made['id']}"
    assert await (await client.get(path)).json() == made
    response = await client.get(f"{path}/content")
    assert await response.read() == LINE
    assert response.headers["Content-Disposition"] == 'attachment; filename="in.jsonl"'
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    part = await client.get(f"{path}/content", headers={"Range": "bytes=2-10"})
    assert (part.status, await part.read()) == (206, LINE[2:11])
    assert contents(tmp_path) == [made["id"]]
    assert await (await client.delete(path)).json() == {"id": made["id"], "deleted": True, "object": "file"}
    assert contents(tmp_path) == []
    for gone in (client.get(path), client.get(f"{path}/content"), client.delete(path)):
        response = await gone
        assert (response.status, (await response.json())["error"]["code"]) == (404, "file_not_found")


async def test_a_file_may_be_larger_than_other_bodies(tmp_path: Path) -> None:
    content = LINE * 30_000
    async with batch_app(tmp_path, [FakeReplica()], runs=False, max_body_bytes=1000) as client:
        made = await upload(client, form(*PLAIN, content=content))
        assert made["bytes"] == len(content) > 3_000_000
        assert await (await client.get(f"/v1/files/{made['id']}/content")).read() == content


async def test_a_file_expires_if_requested(client: TestClient) -> None:
    parts = (("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "3600"))
    whole = (("expires_after", '{"anchor": "created_at", "seconds": 3600}'),)
    for after in (parts, whole):
        made = await upload(client, form(*after, *PLAIN))
        assert made["expires_at"] == made["created_at"] + 3600
    assert (await upload(client, form(("expires_after", "null"), *PLAIN)))["expires_at"] is None


REFUSED = [
    ([("file", None)], "purpose", "provide 'purpose'"),
    ([("purpose", "batch")], "file", "provide 'file'"),
    ([("purpose", "fine-tune"), ("file", None)], "purpose", "'fine-tune' is not supported"),
    ([("file", None), ("purpose", "assistants")], "purpose", "'assistants' is not supported"),
    ([*PLAIN, ("purpose", "batch")], "purpose", "twice"),
    ([*PLAIN, ("expiry", "24")], "expiry", "Send 'expires_after'"),
    ([*PLAIN, ("color", "red" * 5000)], "color", "longer than 1024 bytes"),
    ([*PLAIN, ("expires_after[anchor]", "created_at")], "expires_after", "3600"),
    ([*PLAIN, ("expires_after[anchor]", "now"), ("expires_after[seconds]", "3600")], "expires_after", "created_at"),
    ([*PLAIN, ("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "1")], "expires_after", "3600"),
    ([*PLAIN, ("expires_after", "[]")], "expires_after", "3600"),
    ([*PLAIN, ("expires_after", "{")], "expires_after", "3600"),
    ([*PLAIN, ("expires_after", '{"anchor": "created_at", "seconds": 3600, "x": 1}')], "expires_after", "3600"),
    ([("purpose", "b" * 5000), ("file", None)], "purpose", "longer than 1024 bytes"),
]


@pytest.mark.parametrize("name", ["visibility", "color", "a,b"])
async def test_a_field_without_effect_is_named(client: TestClient, tmp_path: Path, name: str) -> None:
    response = await client.post("/v1/files", data=form((name, "user"), *PLAIN))
    assert response.status == 200
    assert response.headers["X-Tramontane-Ignored"] == name.replace(",", "?")
    async with batch_app(tmp_path / "strict", [FakeReplica()], runs=False, strict=True) as strict:
        response = await strict.post("/v1/files", data=form((name, "user"), *PLAIN))
        assert (response.status, (await response.json())["error"]["param"]) == (400, name.replace(",", "?"))
        assert contents(tmp_path / "strict") == []


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
async def test_a_wrong_form_leaves_no_file(
    client: TestClient, tmp_path: Path, fields: list[tuple[str, Any]], param: str, words: str
) -> None:
    response = await client.post("/v1/files", data=form(*fields))
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param), error
    assert words in error["message"]
    assert contents(tmp_path) == []


HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
BROKEN = [
    ("multipart/form-data; boundary=x", HEAD + LINE),
    ("multipart/form-data; boundary=x", b"nothing of the kind"),
    ("multipart/form-data; boundary=x", b"--x\r\nno header\r\n\r\n"),
    ("multipart/form-data; boundary=x", b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y--\r\n--x--\r\n"),
    ("multipart/form-data", HEAD + LINE + b"\r\n--x--\r\n"),
    (f"multipart/form-data; boundary={'x' * 100}", HEAD),
    (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nno name\r\n--x--\r\n',
    ),
    ("multipart/form-data; boundary=x", b""),
]


@pytest.mark.parametrize(("content_type", "body"), BROKEN)
async def test_a_malformed_form(client: TestClient, tmp_path: Path, content_type: str, body: bytes) -> None:
    response = await client.post("/v1/files", data=body, headers={"Content-Type": content_type})
    assert response.status == 400, await response.text()
    assert (await response.json())["error"]["type"] == "invalid_request_error"
    assert contents(tmp_path) == []


async def test_forms_and_json_are_refused_where_the_other_is_expected(client: TestClient) -> None:
    response = await client.post("/v1/files", json={"purpose": "batch"})
    assert (response.status, (await response.json())["error"]["code"]) == (415, "unsupported_media_type")
    response = await client.post("/v1/batches", data=form(*PLAIN))
    assert (response.status, (await response.json())["error"]["code"]) == (415, "unsupported_media_type")


async def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.batch.app.open_files", lambda folder: FileContents(folder / "files", max_bytes=1000))
    async with batch_app(tmp_path, [FakeReplica()], runs=False) as client:
        response = await client.post("/v1/files", data=form(*PLAIN, content=b"x" * 5000))
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (413, "file_too_large")
        assert contents(tmp_path) == []


async def test_a_client_that_stops_sending_or_disconnects_leaves_no_file(tmp_path: Path) -> None:
    async with batch_app(tmp_path, [FakeReplica()], runs=False, body_timeout_s=0.2) as client:
        sent = asyncio.Event()

        async def half() -> AsyncIterator[bytes]:
            yield HEAD + LINE * 1000
            sent.set()
            await asyncio.sleep(60)

        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        response = await client.post("/v1/files", data=half(), headers=headers)
        assert (response.status, (await response.json())["error"]["code"]) == (408, "request_timeout")
        assert contents(tmp_path) == []
    async with batch_app(tmp_path, [FakeReplica()], runs=False) as client:
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + HEAD + LINE * 100
        )
        await writer.drain()
        async with asyncio.timeout(5):
            while not contents(tmp_path):
                await asyncio.sleep(0.01)
            writer.close()
            while contents(tmp_path):
                await asyncio.sleep(0.01)
        assert (await (await client.get("/v1/files")).json())["data"] == []


async def test_pages(client: TestClient) -> None:
    ids = [(await upload(client))["id"] for _ in range(5)]

    async def page(**query: Any) -> tuple[list[str], bool]:
        response = await client.get("/v1/files", params=query)
        answer = await response.json()
        assert response.status == 200, answer
        listed = [file["id"] for file in answer["data"]]
        assert (answer["first_id"], answer["last_id"]) == ((listed[0], listed[-1]) if listed else (None, None))
        return listed, answer["has_more"]

    assert await page() == (ids[::-1], False)
    assert await page(order="asc") == (ids, False)
    assert await page(order="asc", limit=2) == (ids[:2], True)
    assert await page(order="asc", limit=2, after=ids[1]) == (ids[2:4], True)
    assert await page(limit=3, after=ids[3]) == ([ids[2], ids[1], ids[0]], False)
    assert await page(purpose="batch", limit=1) == ([ids[4]], True)
    assert await page(purpose="batch_output") == ([], False)
    assert await page(purpose="vision") == ([], False)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=no", "after"),
        ("after=%00", "after"),
        ("colour=red", "colour"),
    ],
)
async def test_wrong_queries(client: TestClient, query: str, param: str) -> None:
    response = await client.get(f"/v1/files?{query}")
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param), error


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x\\in.jsonl", 'a"b;X: y\t', "é" * 400, "\u202e.jsonl", "/"])
async def test_file_names_are_cleaned(client: TestClient, name: str) -> None:
    made = await upload(client, form(*PLAIN, filename=name))
    assert 0 < len(made["filename"]) <= 255
    assert not set(made["filename"]) & set("/\\\r\n\u202e")
    response = await client.get(f"/v1/files/{made['id']}/content")
    assert response.status == 200
    assert response.headers["Content-Disposition"].isascii()


@pytest.mark.parametrize("file_id", ["file-0", "%00", "..%2f..%2fbatches.db", "batches.db", "a" * 500])
async def test_invalid_ids(client: TestClient, file_id: str) -> None:
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        response = await client.get(path)
        assert response.status == 404
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_a_key_sees_its_own_files_and_an_admin_all(tmp_path: Path) -> None:
    headers = {}
    for name, admin in (("a", False), ("b", False), ("root", True)):
        key, secret = new_key(name, admin=admin)
        add_key(tmp_path / "keys.json", key)
        headers[name] = {"Authorization": f"Bearer {secret}"}
    async with batch_app(tmp_path, [FakeReplica()], runs=False, keyring=Keyring(tmp_path / "keys.json")) as client:
        file_id = (await upload(client, headers=headers["a"]))["id"]
        assert (await client.post("/v1/files", data=form(*PLAIN))).status == 401
        for name, status in (("a", 200), ("b", 404), ("root", 200)):
            path = f"/v1/files/{file_id}"
            assert (await client.get(path, headers=headers[name])).status == status
            assert (await client.get(f"{path}/content", headers=headers[name])).status == status
            listed = (await (await client.get("/v1/files", headers=headers[name])).json())["data"]
            assert [file["id"] for file in listed] == ([file_id] if status == 200 else [])
            body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
            assert (await client.post("/v1/batches", json=body, headers=headers[name])).status == status
        assert (await client.delete(f"/v1/files/{file_id}", headers=headers["b"])).status == 404
        refused = await client.delete(f"/v1/files/{file_id}", headers=headers["root"])
        assert refused.status == 400, "a batch still reads it"


async def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("support.batch.app.open_files", lambda folder: FileContents(folder / "files", open_new=full))
    async with batch_app(tmp_path, [FakeReplica()], runs=False) as client:
        response = await client.post("/v1/files", data=form(*PLAIN))
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (503, "store_unavailable")
        assert str(tmp_path) not in json.dumps(error)
        assert response.headers["Retry-After"] == "1"
        assert contents(tmp_path) == []


async def test_without_batches() -> None:
    app = make_app(router=Router([FakeReplica()]), tokenizer=TOKENIZER, chat_template=None, model_name="demo")
    async with TestClient(TestServer(app)) as client:
        for response in (await client.get("/v1/files"), await client.post("/v1/files", data=form(*PLAIN))):
            assert (response.status, (await response.json())["error"]["code"]) == (400, "batches_disabled")
