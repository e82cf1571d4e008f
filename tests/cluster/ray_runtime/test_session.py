"""A Ray of our own, without starting one: its token, and addresses where nothing listens."""

import contextlib
import os
import socket
import stat

import pytest

from cluster.ray_runtime import session
from cluster.ray_runtime.session import connect, ensure_token, token_path
from cluster.ray_runtime.start_watch import RayLateError
from workers.errors import ConfigError


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_is_made_once_and_only_its_owner_reads_it(home):
    ensure_token()
    path = home / ".ray" / "auth_token"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64
    assert token_path() == path
    before = path.read_text()
    ensure_token()
    assert path.read_text() == before


def test_a_token_that_the_user_set_is_kept(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    ensure_token()
    assert not (home / ".ray").exists()
    assert token_path() is None


def test_without_a_writable_home_the_token_lives_in_the_environment(home):
    (home / ".ray").write_text("a file where the folder should be")
    ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_dead_address_is_named_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"Nothing answers at the Ray address {address}"):
        connect(address, namespace="test", log_to_driver=False)


@pytest.mark.parametrize("num_late", [1, 2])
def test_a_ray_that_is_late_is_started_once_more(monkeypatch, home, caplog, num_late):
    starts = []

    def start_once(**settings):
        starts.append(settings)
        if len(starts) <= num_late:
            raise RayLateError("Ray could not be started: one of its processes was not up.")
        return "folder"

    monkeypatch.setattr(session, "_start_once", start_once)
    with contextlib.nullcontext() if num_late == 1 else pytest.raises(RayLateError):
        assert connect(None, namespace="one", num_cpus=3).folder == "folder"
    assert len(starts) == 2 and starts[0] == starts[1]
    assert "Starting Ray once more" in caplog.text
