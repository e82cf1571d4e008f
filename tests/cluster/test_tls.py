"""Certificates: good, renewed, and every way in which two files are not one; made with the `cryptography` that comes with Ray."""

import asyncio
import datetime
import ipaddress
import shutil
import ssl
from pathlib import Path

import pytest
from aiohttp import web

from cluster.api.listener import Listener
from cluster.operate import ask
from cluster.tls import Certificate, client_context, load
from workers.errors import ConfigError

pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_pair(folder: Path, name: str, *, password: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    return paths


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
        (*locked, "is encrypted; store it without a password"),
        (junk, a[1], "no certificate and key in PEM format"),
        (a[0], junk, "no certificate and key in PEM format"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(cert, key)
    with pytest.raises(ConfigError, match=r"--ca-cert .* is no certificate"):
        client_context(junk)
    with pytest.raises(ConfigError, match=r"--ca-cert .* is no certificate"):
        client_context(tmp_path / "none")


async def hello(request: web.Request) -> web.Response:
    return web.Response(text="hello")


async def test_https_is_served_trusted_by_its_certificate_and_renewed(tmp_path, caplog):
    old, new = make_pair(tmp_path, "old"), make_pair(tmp_path, "new")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(old[0], cert)
    shutil.copy(old[1], key)
    certificate = Certificate(cert, key, look_again_s=0.01)
    app = web.Application()
    app.router.add_get("/", hello)
    listener = await Listener(app, tls=certificate.context).open("127.0.0.1", 0)
    task = asyncio.create_task(certificate.run())
    url = f"https://127.0.0.1:{listener.port}/"

    async def get(ca: Path) -> bytes:
        return await asyncio.to_thread(ask, url, api_key=None, ca_cert=ca)

    try:
        assert await get(old[0]) == b"hello"
        with pytest.raises(ConfigError, match=r"is not trusted .* --ca-cert"):
            await get(new[0])
        shutil.copy(new[0], cert)  # for a moment the files are no pair
        async with asyncio.timeout(10):
            while "is not the key" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await get(old[0]) == b"hello"
        shutil.copy(new[1], key)
        async with asyncio.timeout(10):
            while "was read again" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await get(new[0]) == b"hello"
        weak = client_context(new[0])
        weak.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        weak.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", listener.port, ssl=weak)
    finally:
        task.cancel()
        await listener.close()
