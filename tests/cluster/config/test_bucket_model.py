"""A checkpoint in a bucket: fsspec's own file system in memory stands for one."""

import fsspec
import pytest
from support.checkpoints.tiny import write_tiny_checkpoint

from cluster.config.checkpoint_location import find_model, resolve_model
from workers.errors import ConfigError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    for path in folder.iterdir():
        fs.pipe_file(f"/bucket/tiny/{path.name}", path.read_bytes())
    fs.pipe_file("/bucket/tiny/code.py", b"print()")
    fs.pipe_file("/bucket/empty/readme.txt", b"x")
    yield fs, folder
    fs.store.clear()


def test_its_files_become_a_folder(bucket):
    _, folder = bucket
    assert find_model("memory://bucket/tiny") is None
    location, name = resolve_model("memory://bucket/tiny/")
    assert name == "tiny"
    found = {p.name: p.read_bytes() for p in location.iterdir()}
    assert found == {p.name: p.read_bytes() for p in folder.iterdir()}, "and no code"


def test_what_is_there_is_not_downloaded_again(bucket):
    fs, _ = bucket
    location, _ = resolve_model("memory://bucket/tiny")
    kept = {p.name: p.stat().st_mtime_ns for p in location.iterdir()}
    fs.pipe_file("/bucket/tiny/config.json", fs.cat_file("/bucket/tiny/config.json") + b" \n")
    assert resolve_model("memory://bucket/tiny")[0] == location
    changed = {p.name for p in location.iterdir() if p.stat().st_mtime_ns != kept[p.name]}
    assert changed == {"config.json"}
    assert find_model("memory://bucket/tiny") == location


def test_errors_say_what_to_do(bucket):
    with pytest.raises(ConfigError, match=r"has no files of a checkpoint\. Give the address of the folder"):
        resolve_model("memory://bucket/empty")
    with pytest.raises(ConfigError, match=r"nope://x/y cannot be read: .*Use s3://, gs:// or az://"):
        resolve_model("nope://x/y")
