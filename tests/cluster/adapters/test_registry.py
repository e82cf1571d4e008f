"""The registry's transitions: each by example, then any order of them against what must always hold."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.adapters import registry as r
from cluster.adapters.registry import EMPTY, find_adapter, find_revision
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from workers.errors import RequestError


def revision(digest: str, name: str = "support", *, share: float | None = None) -> AdapterRevision:
    return AdapterRevision(
        id=f"{name}@{digest}", name=name, source="/a", digest=digest, rank=8, num_bytes=100, share=share
    )


def load(registry: Registry, digest: str, name: str = "support", *, share: float | None = None) -> Registry:
    registry = r.begin(registry, revision(digest, name, share=share), in_place=True)
    return r.loaded(registry, f"{name}@{digest}", now=5.0)


def states(registry: Registry) -> dict[str, str]:
    return {x.digest: x.state.value for x in registry.revisions}


def test_a_name_serves_when_its_first_revision_is_loaded():
    registry = r.begin(EMPTY, revision("a"))
    assert find_adapter(registry, "support") == Adapter(name="support")
    assert not list(r.names_of(registry)) and [x.id for x in r.wanted(registry)] == ["support@a"]
    registry = r.loaded(registry, "support@a", now=5.0)
    assert [(a.name, x.id, x.loaded_at) for a, x in r.names_of(registry)] == [("support", "support@a", 5.0)]


def test_a_load_in_place_keeps_the_revision_before_for_a_rollback_and_retires_the_one_before_that():
    registry = load(load(load(EMPTY, "a"), "b"), "c")
    assert find_adapter(registry, "support") == Adapter(name="support", current="support@c", previous="support@b")
    assert states(registry) == {"a": "retiring", "b": "ready", "c": "ready"}
    registry = r.rollback(registry, "support")
    assert find_adapter(registry, "support") == Adapter(name="support", current="support@b")
    registry = r.drained(r.drained(registry, "support@a"), "support@c")
    assert states(registry) == {"b": "ready"}
    with pytest.raises(RequestError, match="neither a canary nor a revision before"):
        r.rollback(registry, "support")


def test_a_canary_is_promoted_or_rolled_back():
    registry = load(load(EMPTY, "a"), "b", share=0.1)
    assert find_adapter(registry, "support") == Adapter(
        name="support", current="support@a", canary="support@b", canary_share=0.1
    )
    rolled_back = r.rollback(registry, "support")
    assert find_adapter(rolled_back, "support") == Adapter(name="support", current="support@a")
    assert states(rolled_back) == {"a": "ready", "b": "retiring"}
    promoted = r.promote(registry, "support")
    assert find_adapter(promoted, "support") == Adapter(name="support", current="support@b", previous="support@a")
    assert find_adapter(r.rollback(promoted, "support"), "support").current == "support@a"
    with pytest.raises(RequestError, match="no canary to promote"):
        r.promote(promoted, "support")


def test_the_share_of_a_canary_changes_without_a_second_load():
    registry = load(load(EMPTY, "a"), "b", share=0.1)
    more = r.begin(registry, revision("b", share=0.5))
    assert find_adapter(more, "support").canary_share == 0.5 and more.revisions == registry.revisions


@pytest.mark.parametrize(
    ("loaded", "share", "in_place", "digest", "message"),
    [
        ([], 0.1, False, "a", "no revision yet that a canary could be compared with"),
        (["a"], None, False, "b", "has already been loaded. .* set 'load_inplace' to True"),
        (["a"], 0.1, False, "a", "has the same content as its current revision"),
        (["a", ("b", 0.1)], 0.1, False, "c", "has another canary, support@b. Promote it"),
        (["a", ("b", 0.1)], None, True, "c", "has a canary, support@b. Promote it"),
    ],
)
def test_what_a_load_refuses(loaded, share, in_place, digest, message):
    registry = EMPTY
    for one in loaded:
        registry = load(registry, one) if isinstance(one, str) else load(registry, one[0], share=one[1])
    with pytest.raises(RequestError, match=message):
        r.begin(registry, revision(digest, share=share), in_place=in_place)


def test_one_load_of_a_name_at_a_time():
    registry = r.begin(load(EMPTY, "a"), revision("b"), in_place=True)
    for change in (r.promote, r.rollback, lambda now, name: r.begin(now, revision("c"), in_place=True)):
        with pytest.raises(RequestError, match="is being loaded already"):
            change(registry, "support")


@pytest.mark.parametrize("name", ["", "a@b", "-a", "x" * 129, "a b", "é"])
def test_names_that_cannot_be(name):
    with pytest.raises(RequestError, match="cannot be the name of an adapter"):
        r.begin(EMPTY, replace(revision("a"), name=name))


def test_a_failed_load_changes_nothing_that_serves_and_stays_listed_until_the_next():
    registry = r.failed(r.begin(load(EMPTY, "a"), revision("b"), in_place=True), "support@b", "NaN in q_proj.")
    assert find_adapter(registry, "support").current == "support@a"
    assert find_revision(registry, "support@b").reason == "NaN in q_proj."
    assert [x.digest for x in r.wanted(registry)] == ["a"]
    assert states(load(registry, "c")) == {"a": "ready", "c": "ready"}
    first = r.failed(r.begin(EMPTY, revision("a")), "support@a", "NaN.")
    assert not list(r.names_of(first)) and states(first) == {"a": "failed"}
    assert [(a.name, x.id) for a, x in r.names_of(load(first, "b"))] == [("support", "support@b")]


def test_unload_retires_everything_of_the_name_and_nothing_else():
    registry = load(load(load(EMPTY, "x", "other"), "a"), "b", share=0.5)
    registry = r.unload(registry, "support")
    assert [a.name for a in registry.adapters] == ["other"]
    assert states(registry) == {"x": "ready", "a": "retiring", "b": "retiring"}
    with pytest.raises(RequestError, match=r"'support' cannot be found. The adapters are: 'other'"):
        r.unload(registry, "support")


def test_a_retiring_content_can_be_loaded_again():
    registry = load(r.unload(load(EMPTY, "a"), "support"), "a")
    assert states(registry) == {"a": "ready"} and find_adapter(registry, "support").current == "support@a"


CHANGES = st.one_of(
    st.tuples(st.just("load"), st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from([None, 0.3])),
    st.tuples(st.just("end"), st.sampled_from(["loaded", "failed"])),
    st.tuples(st.sampled_from(["promote", "rollback", "unload"]), st.sampled_from("ab")),
    st.tuples(st.just("drained"), st.sampled_from("ab"), st.sampled_from("xyz")),
)


@given(st.lists(CHANGES, max_size=25))
def test_whatever_happens_names_serve_only_what_is_loaded(changes):
    registry = EMPTY
    for change in changes:
        before = registry
        try:
            registry = _apply(registry, change)
        except RequestError:
            assert registry is before
        _check(registry)


def _apply(registry: Registry, change: tuple) -> Registry:
    match change:
        case ("load", name, digest, share):
            return r.begin(registry, revision(digest, name, share=share), in_place=True)
        case ("end", how):
            for x in r.in_state(registry, RevisionState.LOADING):
                registry = r.loaded(registry, x.id, now=1.0) if how == "loaded" else r.failed(registry, x.id, "bad")
            return registry
        case ("drained", name, digest):
            return r.drained(registry, f"{name}@{digest}")
        case (kind, name):
            return {"promote": r.promote, "rollback": r.rollback, "unload": r.unload}[kind](registry, name)
    raise AssertionError(change)


def _check(registry: Registry) -> None:
    known = {x.id: x for x in registry.revisions}
    assert len(known) == len(registry.revisions) and len({a.name for a in registry.adapters}) == len(registry.adapters)
    used = set()
    for adapter in registry.adapters:
        for role in ("current", "canary", "previous"):
            if (revision_id := getattr(adapter, role)) is None:
                continue
            assert revision_id not in used, f"{revision_id} has two roles"
            used.add(revision_id)
            # What was used before may be loaded again, in place or as a canary.
            allowed = (RevisionState.READY, RevisionState.LOADING) if role == "previous" else (RevisionState.READY,)
            assert known[revision_id].state in allowed, f"{adapter} has a {role} that is {known[revision_id].state}"
        loading = [x for x in known.values() if x.name == adapter.name and x.state is RevisionState.LOADING]
        assert len(loading) <= 1
    for x in known.values():
        assert x.state is not RevisionState.READY or x.id in used, f"{x.id} is loaded for nothing"
