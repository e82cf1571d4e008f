"""Reading and writing the files of batches: local paths, any fsspec storage, and S3's protocol against a server on loopback."""

import contextlib
import gzip
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import fsspec
import pytest
from support.hosts.ray_hosts import free_port

from cluster.cli.batch.locations import (
    LocationError,
    absolute,
    check_writable,
    deliver,
    exists,
    fetch,
    names_in_folder_of,
    num_bytes,
    plain_name,
    reading,
    remove,
    with_suffix,
)
from workers.errors import ConfigError

# The public default key of Azurite.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
TEXT = b'{"prompt": "a"}\n{"prompt": "b"}\n'


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")  # shared by the whole process
    fs.store.clear()
    yield "memory://bucket/out.jsonl"
    fs.store.clear()


@pytest.fixture
def s3(monkeypatch):
    """A bucket on a server that speaks S3's protocol."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{port}"  # moto keeps its state after the server ends
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/folder/out.jsonl"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def az(tmp_path, monkeypatch):
    """A container on a server that speaks Azure's protocol, where adlfs and Azurite (npm) are installed."""
    pytest.importorskip("adlfs")
    if shutil.which("azurite-blob") is None:
        pytest.skip("Azurite is not installed (npm install azurite)")
    port, folder = free_port(), str(tmp_path / "azurite")
    command = ["azurite-blob", "--blobPort", str(port), "--location", folder, "--silent", "--skipApiVersionCheck"]
    with listening([*command, "--disableTelemetry"], port):
        where = f"DefaultEndpointsProtocol=http;BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1"
        account = f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY}"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"{where};{account};")
        fs = fsspec.filesystem("az", skip_instance_cache=True)
        fs.mkdir("bucket")
        yield "az://bucket/folder/out.jsonl"
        type(fs).clear_instance_cache()


@pytest.fixture
def gs(monkeypatch):
    """A bucket on a server that speaks Google's protocol, where gcsfs and gcp-storage-emulator are installed."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    code = f"from gcp_storage_emulator.server import create_server as c; c('127.0.0.1', {port}, True, 'bucket').run()"
    with listening([sys.executable, "-c", code], port):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://bucket/folder/out.jsonl"
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@contextlib.contextmanager
def listening(command, port):
    """Runs a server during the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, "it does not listen"
            time.sleep(0.05)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("kind", ["local", "memory", "s3", "az", "gs"])
def test_there_and_back(kind, source, tmp_path, request):
    location = str(tmp_path / "new" / "out.jsonl") if kind == "local" else request.getfixturevalue(kind)
    check_writable(location)
    assert not exists(location)
    deliver(source, location)
    deliver(source, location)  # as after a crash
    assert exists(location)
    with reading(location) as file:
        assert list(file) == TEXT.splitlines(keepends=True)
    with reading(location) as file:
        assert file.readline(3) == TEXT[:3]  # a line without a newline must not fill the memory
    with reading(location, seekable=True) as file:
        file.seek(-5, io.SEEK_END)
        assert file.read() == TEXT[-5:]
    assert num_bytes(location) == len(TEXT)
    assert names_in_folder_of(location) == ["out.jsonl"]
    if kind != "local":
        fetch(location, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == TEXT
    remove(location)
    remove(location)
    assert not exists(location)
    with pytest.raises(LocationError, match=r"cannot be read: it does not exist"), reading(location):
        pass


def test_an_object_of_many_parts(s3, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * (60 * 4096))  # more than one part of an upload
    deliver(big, s3)
    with reading(s3) as file:
        assert file.read() == big.read_bytes()


def test_a_storage_that_refuses_is_a_clear_error(s3, source):
    with pytest.raises(LocationError, match=r"^s3://nowhere/x cannot be written: its folder or bucket does not exist"):
        deliver(source, "s3://nowhere/x")


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_compressed_input(kind, tmp_path, request):
    folder = str(tmp_path) if kind == "local" else request.getfixturevalue(kind).rpartition("/")[0]
    location = f"{folder}/in.jsonl.gz"
    with fsspec.open(location, "wb") as file:
        file.write(gzip.compress(TEXT))
    assert plain_name(location).endswith("in.jsonl")
    with reading(location) as file:
        assert file.readline() == TEXT.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    ("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs"), ("az", "adlfs", "az")]
)
def test_a_missing_library_is_named(scheme, module, extra, source, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(ConfigError, match=rf"tramontane\[{extra}\]"):
        deliver(source, f"{scheme}://bucket/x")


def test_an_unknown_storage_is_refused():
    with pytest.raises(ConfigError, match="is not a supported storage"):
        check_writable("nonsense://x/y")


def test_a_failed_delivery_leaves_the_old_output_and_no_temporary_file(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LocationError, match="No space left on device"):
        deliver(source, str(out))
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_folder_is_not_an_output(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(str(tmp_path))


def test_stdout(source, capfdbinary):
    deliver(source, "-")
    assert capfdbinary.readouterr().out == TEXT
    assert not exists("-")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("out.jsonl", "out.errors.jsonl"),
        ("a.b/out", "a.b/out.errors"),
        ("s3://b/x/out.jsonl", "s3://b/x/out.errors.jsonl"),
        (".hidden", ".hidden.errors"),
    ],
)
def test_with_suffix(location, expected):
    assert with_suffix(location, ".errors") == expected


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("x/y") == str(tmp_path / "x" / "y")
    assert absolute("s3://b/x") == "s3://b/x"
    assert absolute("-") == "-"
