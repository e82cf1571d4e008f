"""Contents of adapters on the disk: copied once, unchanged by their source, and removed only when no server holds them."""

from pathlib import Path

import pytest

from cluster.adapters.store import FILES, AdapterStore, size_of
from workers.errors import ConfigError

CONTENT = {name: name.encode() for name in FILES}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def names(store: AdapterStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def test_a_copy_outlives_changes_of_its_source(store, source):
    assert size_of(source) == sum(map(len, CONTENT.values()))
    store.keep(store.stage(source), "d1")
    (source / FILES[1]).write_bytes(b"overwritten")
    assert store.read("d1") == CONTENT and store.held == {"d1"}
    store.keep(store.stage(source), "d1")
    assert store.read("d1") == CONTENT, "a content that is here is not written again"
    assert names(store) == {"d1"}, "no temporary folder is left"


def test_contents_come_over_the_wire_too(store):
    store.write(CONTENT, "d1")
    store.write(CONTENT, "d1")
    assert store.read("d1") == CONTENT and names(store) == {"d1"}


def test_what_another_server_holds_stays(store, source):
    other = AdapterStore(store.folder)
    store.write(CONTENT, "d1")
    assert other.has("d1")
    store.remove("d1")
    store.remove("d1")
    assert other.read("d1") == CONTENT
    other.remove("d1")
    assert names(store) == set() and not store.has("d1")


def test_what_a_killed_server_left_is_swept(store):
    dead = AdapterStore(store.folder)
    for digest in ("mine", "left", "foreign"):
        dead.write(CONTENT, digest)
    other = AdapterStore(store.folder)
    assert other.has("foreign")
    dead.close()  # as the end of its process does
    assert store.has("mine")
    store.sweep()
    assert names(store) == {"mine", "foreign"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path, source):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be copied to .*file/adapters .*--data-dir"):
        AdapterStore(tmp_path / "file" / "adapters").stage(source)
