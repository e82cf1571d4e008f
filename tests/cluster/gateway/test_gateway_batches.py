"""The data directory and its lock, and what a gateway does when it cannot have batches."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from cluster.api.context import NO_BATCHES
from cluster.cli.options.parser import make_parser
from cluster.cli.options.settings import serve_config
from cluster.config.checkpoint_location import resolve_model
from cluster.config.serve import ServeConfig
from cluster.gateway.batches import GatewayBatches, open_batches
from cluster.router.router import Router
from cluster.system.data_dir import DataDir, default_data_dir
from workers.errors import ConfigError


def config(*options: str) -> ServeConfig:
    args: Namespace = make_parser().parse_args(["serve", "--host", "127.0.0.1", *options])
    return serve_config(args, *resolve_model(args.model), device="cpu")


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir("mine") == tmp_path / "tramontane" / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("", "not/absolute"):
        monkeypatch.setenv("XDG_DATA_HOME", unusable)
        assert default_data_dir("mine") == tmp_path / ".local" / "share" / "tramontane" / "mine"


def test_one_model_uses_a_directory_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    first, second = DataDir(path, model_name="one"), DataDir(path, model_name="one")
    assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="another model"):
        DataDir(path, model_name="two")
    first.close()
    first.close()
    with pytest.raises(ConfigError, match="another model"):
        DataDir(path, model_name="two")
    second.close()
    third = DataDir(path, model_name="two")
    with pytest.raises(ConfigError, match="another model"):
        DataDir(path, model_name="one")
    third.close()


def test_a_killed_server_releases_the_directory(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from cluster.system.data_dir import DataDir\n"
    script += "DataDir(Path(sys.argv[1]), model_name='one'); print('held', flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "held\n"), done.stderr
    DataDir(tmp_path, model_name="two").close()


async def test_batches_are_stored_where_the_option_says(tmp_path: Path) -> None:
    opened = open_batches(config("--data-dir", str(tmp_path / "here")), Router())
    assert isinstance(opened, GatewayBatches)
    await opened.close()
    await opened.close()
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["batches.db", "files", "model"]


def test_a_server_starts_even_if_the_default_store_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert open_batches(config(), Router()) == "This server cannot accept batches; its log says why."
    assert "--data-dir" in caplog.text
    with pytest.raises(ConfigError, match="--data-dir"):
        open_batches(config("--data-dir", str(tmp_path / "file" / "x")), Router())
    assert open_batches(config("--no-batches"), Router()) == NO_BATCHES


def test_gateways_on_several_hosts_need_a_shared_store(tmp_path: Path) -> None:
    spread = ("--gateways", "2", "--ray-address", "10.0.0.1:6379", "--api-key", "k")
    public = (*spread[:2], *spread[2:], "--host", "0.0.0.0")
    assert open_batches(config(*public), Router()) == "This server cannot accept batches; its log says why."
    with pytest.raises(ConfigError, match="--batch-store"):
        open_batches(config(*public, "--data-dir", str(tmp_path)), Router())


def test_an_unreachable_database_is_refused_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://nobody:secret@%2F{os.fspath(tmp_path)[1:].replace('/', '%2F')}/x"
    with pytest.raises(ConfigError) as e:
        open_batches(config("--data-dir", str(tmp_path), "--batch-store", url), Router())
    assert "secret" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--no-batches", "--data-dir", "x"), "no effect"),
        (("--batch-store", "mysql://x"), "PostgreSQL"),
    ],
)
def test_options_that_cannot_work(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(*options)


def test_a_database_address_is_not_shown() -> None:
    assert "secret" not in repr(config("--batch-store", "postgresql://u:secret@h/d"))
