"""The keys file: its contents and permissions, and that neither a crash nor a second writer loses a key."""

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from cluster.keys.file import add_key, default_path, read_keys, revoke_key
from cluster.keys.key import Limits, NotAllowedError, digest, new_key
from cluster.keys.keyring import RELOAD_INTERVAL_S, Keyring
from workers.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


def make(path: Path, name: str, **options) -> str:
    key, secret = new_key(name, **options)
    add_key(path, key)
    return secret


def test_a_key_is_stored_with_its_limits_and_without_its_secret(path):
    limits = Limits(requests_per_minute=60, tokens_per_minute=1000, max_concurrency=2, models=("demo",), priority=3)
    secret = make(path, "alice", admin=True, limits=limits)
    (key,) = read_keys(path)
    assert (key.name, key.admin, key.limits, key.sha256) == ("alice", True, limits, digest(secret))
    assert secret.startswith("tm-") and len(secret) > 40
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {p.name for p in path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_secrets_and_ids_differ():
    made = [new_key("x") for _ in range(100)]
    assert len({secret for _, secret in made}) == len({key.id for key, _ in made}) == 100


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "é", "x" * 65, "a/b", "a\n"])
def test_invalid_names(path, name):
    with pytest.raises(ConfigError, match="Start with a letter or digit"):
        add_key(path, new_key(name)[0])
    assert not path.exists()


def test_names_are_unique_and_a_key_is_revoked_by_id_or_name(path):
    make(path, "alice")
    make(path, "bob")
    with pytest.raises(ConfigError, match="'alice' already exists"):
        make(path, "alice")
    alice, bob = read_keys(path)
    assert revoke_key(path, alice.id) == alice
    assert revoke_key(path, "bob") == bob
    assert read_keys(path) == []
    with pytest.raises(ConfigError, match="no key 'bob'"):
        revoke_key(path, "bob")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "malformed"),
        ("{", "malformed"),
        ("[]", "malformed"),
        ('{"version": 2, "keys": []}', "version 2"),
        ('{"version": 1, "keys": [{"id": "a", "name": "a", "sha256": "x", "created": 1}]}', "64 hexadecimal"),
        ('{"version": 1, "keys": [], "more": 1}', "more"),
        (json.dumps({"version": 1, "keys": [{"id": i, "name": "a", "sha256": "0" * 64, "created": 1} for i in "ab"]}), "same name"),
        (
            f'{{"version": 1, "keys": [{{"id": "a", "name": "a", "sha256": "{"0" * 64}", "created": 1, '
            f'"limits": {{"priority": {2**40}}}}}]}}',
            "must be between",
        ),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_with_the_reason(path, content, says):
    path.parent.mkdir()
    path.write_text(content)
    for act in (lambda: read_keys(path), lambda: Keyring(path), lambda: make(path, "new")):
        with pytest.raises(ConfigError, match=says):
            act()
    assert path.read_text() == content


def test_a_missing_file_is_refused_with_the_command_that_creates_one(path):
    with pytest.raises(ConfigError, match="tramontane keys create"):
        Keyring(path)


def create_many(path: Path, writer: int) -> None:
    for i in range(10):
        make(path, f"w{writer}-{i}")


def test_writers_do_not_lose_each_others_keys(path):
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=create_many, args=(path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(read_keys(path)) == 30


def test_a_writer_that_was_killed_in_mid_write_leaves_the_old_file(path):
    make(path, "alice")
    path.with_name("keys.json.tmp").write_text("half a fi")
    assert [key.name for key in read_keys(path)] == ["alice"]
    make(path, "bob")
    assert [key.name for key in read_keys(path)] == ["alice", "bob"]


def test_the_keyring_follows_the_file_and_keeps_the_old_keys_when_it_breaks(path, caplog):
    now = 0.0
    alice = make(path, "alice")
    keyring = Keyring(path, clock=lambda: now)
    bob = make(path, "bob")
    assert keyring.find(bob) is None, "the file is checked at most once a second"
    now += RELOAD_INTERVAL_S
    assert keyring.find(bob).name == "bob"
    good = path.read_text()
    for broken in ("{", None):
        path.write_text(broken) if broken else path.unlink()
        now += RELOAD_INTERVAL_S
        caplog.clear()
        assert keyring.find(alice) and keyring.find(bob)
        assert "are unchanged" in caplog.text
    path.write_text(good)
    revoke_key(path, "alice")
    now += RELOAD_INTERVAL_S
    assert keyring.find(alice) is None and keyring.find(bob) is not None
    for wrong in ("", "tm-", bob[:-1], bob + "x", "\udcff"):
        assert keyring.find(wrong) is None


def test_the_servers_own_key_is_an_admin_key_next_to_the_files(path):
    secret = make(path, "alice")
    keyring = Keyring(path, api_key="own")
    assert keyring.guards and keyring.find("own").admin and not keyring.find(secret).admin
    assert Keyring(api_key="own").guards and not Keyring().guards


def test_the_default_path(monkeypatch, tmp_path):
    monkeypatch.setenv("TRAMONTANE_API_KEYS", "/x/y.json")
    assert default_path() == Path("/x/y.json")
    monkeypatch.delenv("TRAMONTANE_API_KEYS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_path() == tmp_path / "tramontane" / "keys.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".config" / "tramontane" / "keys.json"


@pytest.mark.parametrize(
    ("best", "asked", "gets"),
    [(None, None, 0), (None, -5, -5), (3, None, 3), (3, -5, 3), (3, 7, 7), (-2, None, -2), (-2, 0, 0)],
)
def test_priorities_are_clamped(best, asked, gets):
    key, _ = new_key("x", limits=Limits(priority=best))
    assert key.priority(asked) == gets


def test_a_key_is_limited_to_its_models():
    key, _ = new_key("x", limits=Limits(models=("a", "b")))
    key.check_model("a")
    with pytest.raises(NotAllowedError, match=r"'c'\. Use one of the models it allows: 'a', 'b'") as e:
        key.check_model("c")
    assert (e.value.param, e.value.code) == ("model", "model_not_allowed")
    new_key("x")[0].check_model("c")
