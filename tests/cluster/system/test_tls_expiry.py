"""When a certificate ends, and that a renewed one is noticed."""

import asyncio
import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.system.tls import Certificate

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def write(folder: Path, days: int) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(START)
        .not_valid_after(START + datetime.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = folder / "cert.pem", folder / "key.pem"
    for path, content in zip(paths, (cert.public_bytes(pem), private), strict=True):
        path.write_bytes(content)
    return paths


async def test_a_renewed_certificate_ends_later(tmp_path: Path) -> None:
    certificate = Certificate(*write(tmp_path, 10), poll_s=0.01)
    assert certificate.expires_at == (START + datetime.timedelta(days=10)).timestamp()
    task = asyncio.create_task(certificate.run())
    write(tmp_path, 100)
    async with asyncio.timeout(10):
        while certificate.expires_at != (START + datetime.timedelta(days=100)).timestamp():
            await asyncio.sleep(0.01)
    task.cancel()
