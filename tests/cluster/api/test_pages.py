"""The web page's files: served without a key, with their types and a policy that restricts them to this origin; no others are served."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL
from yarl import URL

from cluster.api import pages
from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
KEY = "a-key"
FILES = sorted(path for path in pages.FOLDER.rglob("*") if path.is_file())
PAGES = {"/": "index.html", "/docs": "docs.html"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture
async def client() -> AsyncIterator[TestClient]:
    app = make_app(
        router=Router([FakeReplica()]), tokenizer=TOKENIZER, chat_template=None, model_name="demo", api_key=KEY
    )
    async with TestClient(TestServer(app)) as client:
        yield client


def address(file: Path) -> str:
    names = {name: path for path, name in PAGES.items()}
    return names.get(file.name) or f"/{file.relative_to(pages.FOLDER)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
async def test_every_file_is_served_without_a_key(client: TestClient, file: Path) -> None:
    response = await client.get(address(file))
    assert response.status == 200
    assert await response.read() == file.read_bytes()
    assert response.headers["Content-Type"] == pages.CONTENT_TYPES[file.suffix]
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_browsers_revalidate_files(client: TestClient) -> None:
    first = await client.get("/")
    assert first.headers["Cache-Control"] == "no-cache"
    again = await client.get("/", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, await again.read()) == (304, b"")
    assert (await client.head("/")).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/nothing.js",
        "/static/index.html",
        "/static/.js",
        "/static/../index.html",
        "/static/../../api/pages.py",
        "/static/%2e%2e/%2e%2e/api/pages.py",
        "/static/..%2f..%2fapi%2fpages.py",
        "/static/..%2fstatic%2fapp.js",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/app.js%00.css",
        "/static/app.js/",
    ],
)
async def test_no_other_file_can_be_reached(client: TestClient, path: str) -> None:
    response = await client.get(URL(path, encoded=True), headers={"Authorization": f"Bearer {KEY}"})
    assert response.status == 404
    assert (await response.json())["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_works_offline_and_opens_with_a_comment(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace(SVG_NAMESPACE, "")
    outside = re.findall(r"""https?://[^\s"'`$]+|["'(]//\w[^\s"']*|@import[^;]*""", text)
    assert not outside, f"{file.name} must work offline, and names {outside}"
    if file.suffix == ".html":
        inline = re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text)
        assert not inline, f"the content security policy forbids {inline} in {file.name}"
    if file.suffix == ".js":
        risky = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert not risky, f"{file.name} uses {risky}; a model's output must stay text"
    if file.suffix != ".svg":
        opening = {".js": "//", ".css": "/*", ".html": "<!doctype html>\n<!--"}[file.suffix]
        assert text.startswith(opening), f"{file.name} does not open with a comment that says what it knows"


def test_all_referenced_files_exist() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"""(?:from|import) "\./([\w.]+)\"""", text):
            assert (pages.FOLDER / "static" / name).is_file(), f"{file.name} imports {name}, which does not exist"
        for name in re.findall(r"""(?:src|href)="(static/[\w.]+)\"""", text):
            assert (pages.FOLDER / name).is_file(), f"{file.name} refers to {name}, which does not exist"
