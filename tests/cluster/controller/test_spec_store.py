"""Saved specs: the newest is loaded, one of version 0.1.0 is read or ignored with a log line, and all are deleted together."""

import pickle
from dataclasses import replace

import pytest

from cluster.controller.spec_store import delete_spec, load_spec, save_spec
from cluster.protocol.spec import ClusterSpec
from cluster.ray_runtime.internals import KeyValueStore

SPEC = ClusterSpec(model_name="m", engine=None)  # type: ignore[arg-type]
OLD_NAMESPACE = "tramontane-w\x69shes"
# A pickled class of a module that only version 0.1.0 has.
UNREADABLE = b"ccluster.replicas.state\nClusterSpec\n."


@pytest.fixture(autouse=True)
def saved(monkeypatch) -> dict[tuple[str, str], bytes]:
    """Stands for Ray's control store: (namespace, key) -> value."""
    saved: dict[tuple[str, str], bytes] = {}
    monkeypatch.setattr(KeyValueStore, "get", lambda self, key: saved.get((self.namespace, key)))
    monkeypatch.setattr(KeyValueStore, "put", lambda self, key, value: saved.update({(self.namespace, key): value}))
    monkeypatch.setattr(KeyValueStore, "delete", lambda self, key: saved.pop((self.namespace, key), None))
    return saved


def test_the_newest_spec_of_a_deployment_is_loaded():
    assert load_spec("demo") is None
    save_spec("demo", SPEC)
    save_spec("demo", replace(SPEC, max_replicas=3))
    save_spec("other", SPEC)
    assert load_spec("demo") == replace(SPEC, max_replicas=3)
    delete_spec("demo")
    assert (load_spec("demo"), load_spec("other")) == (None, SPEC)


def test_a_spec_of_the_old_namespace_is_read_until_a_new_one_is_saved(saved):
    saved[OLD_NAMESPACE, "demo"] = pickle.dumps(SPEC)
    assert load_spec("demo") == SPEC
    save_spec("demo", replace(SPEC, max_replicas=3))
    assert load_spec("demo") == replace(SPEC, max_replicas=3)
    delete_spec("demo")
    assert load_spec("demo") is None


@pytest.mark.parametrize("value", [UNREADABLE, b"garbage", pickle.dumps({"model_name": "m"})])
def test_an_unreadable_spec_is_ignored_with_a_log_line(saved, caplog, value):
    saved[OLD_NAMESPACE, "demo"] = value
    assert load_spec("demo") is None
    assert "The saved spec of demo" in caplog.text and "ignored" in caplog.text
