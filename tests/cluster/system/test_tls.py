"""Certificates: valid, renewed, and every way in which two files are not a pair."""

import asyncio
import shutil
import ssl
from pathlib import Path

import pytest
from aiohttp import web
from support.servers.certificates import make_pair

from cluster.api.server.listener import Listener
from cluster.cli.client import Client
from cluster.system.tls import Certificate, client_context, load
from workers.errors import ConfigError


def test_files_that_cannot_work(tmp_path):
    a, b = make_pair(tmp_path, "a"), make_pair(tmp_path, "b")
    locked = make_pair(tmp_path, "locked", password=b"secret")
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for cert, key, says in (
        (tmp_path / "none", a[1], r"--tls-cert .*none cannot be read: No such file"),
        (a[0], tmp_path / "none", r"--tls-key .*none cannot be read: No such file"),
        (a[0], tmp_path, "--tls-key .* cannot be read: Is a directory"),
        (a[0], b[1], "is not the key of the certificate"),
        (*locked, r"is encrypted\. Store it without a password"),
        (junk, a[1], "not a certificate and a key in PEM format"),
        (a[0], junk, "not a certificate and a key in PEM format"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(cert, key)
    with pytest.raises(ConfigError, match=r"--ca-cert .* is not a certificate"):
        client_context(junk)
    with pytest.raises(ConfigError, match=r"--ca-cert .* is not a certificate"):
        client_context(tmp_path / "none")


async def hello(request: web.Request) -> web.Response:
    return web.json_response("hello")


async def test_https_is_served_trusted_by_its_certificate_and_renewed(tmp_path, caplog):
    old, new = make_pair(tmp_path, "old"), make_pair(tmp_path, "new")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(old[0], cert)
    shutil.copy(old[1], key)
    certificate = Certificate(cert, key, poll_s=0.01)
    app = web.Application()
    app.router.add_get("/", hello)
    listener = await Listener(app, tls=certificate.context).open("127.0.0.1", 0)
    task = asyncio.create_task(certificate.run())
    url = f"https://127.0.0.1:{listener.port}/"

    def ask(ca: Path) -> str:
        with Client(url, ca_cert=ca) as client:
            return client.get("/", str)

    async def get(ca: Path) -> str:
        return await asyncio.to_thread(ask, ca)

    try:
        assert await get(old[0]) == "hello"
        with pytest.raises(ConfigError, match=r"is not trusted .* --ca-cert"):
            await get(new[0])
        shutil.copy(new[0], cert)  # for a moment the files are not a pair
        async with asyncio.timeout(10):
            while "is not the key" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await get(old[0]) == "hello"
        shutil.copy(new[1], key)
        async with asyncio.timeout(10):
            while "was reloaded" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await get(new[0]) == "hello"
        weak = client_context(new[0])
        weak.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        weak.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", listener.port, ssl=weak)
    finally:
        task.cancel()
        await listener.close()
