"""Suites: the built-in ones are whole, files in both forms load, and what is wrong with one is named."""

import pytest

from cluster.eval.suite import built_in_names, load_suite
from workers.errors import ConfigError


def test_there_are_five_built_in_suites_of_forty_items():
    assert built_in_names() == ["code", "crm", "docs", "marketing", "reasoning"]
    prompts = set()
    for name in built_in_names():
        items = load_suite(name)
        assert len(items) == 40
        assert all(item.suite == name for item in items)
        assert not any(item.check.needs_judge for item in items), "they need no judge"
        prompts |= {item.messages[-1]["content"] for item in items}
    assert len(prompts) == 200


def test_yaml_with_a_system_message(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsystem: Be brief.\nitems:\n"
        "  - {id: a, prompt: Hi, check: {contains: hello}}\n"
        "  - {id: b, messages: [{role: user, content: Hi}], max_tokens: 5, check: {contains: hello}}\n"
    )
    first, second = load_suite(str(path))
    assert [m["role"] for m in first.messages] == ["system", "user"]
    assert [m["role"] for m in second.messages] == ["user"]
    assert (first.name, first.max_tokens, second.max_tokens) == ("mine/a", 128, 5)


def test_json_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"id": 1, "prompt": "Hi", "check": {"exact": "x"}}\n\n{"prompt": "Ho", "check": {"exact": "x"}}\n')
    first, second = load_suite(str(path))
    assert first.name == "lines/1"
    assert second.suite == "lines"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("items: {}", "no list `items`"),
        ("items: []", "has no items"),
        ("- a", "no list `items`"),
        ("items: [3]", "item 1: it is not an object"),
        ("items: [{id: a, check: {exact: x}}]", "item 1: it needs either"),
        ("items: [{id: a, prompt: x, messages: [], check: {exact: x}}]", "needs either"),
        ("items: [{id: a, prompt: x}]", "item 1: check is None"),
        ("items: [{id: a, prompt: x, check: {exact: x}, hint: y}]", "unknown field 'hint'"),
        ("items: [{id: a, prompt: x, max_tokens: 0, check: {exact: x}}]", "max_tokens is 0"),
        (
            "items: [{id: a, prompt: x, check: {exact: x}}, {id: a, prompt: y, check: {exact: x}}]",
            "two items with the id",
        ),
        ("items: [", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_suite(str(path))


def test_an_unknown_suite_names_those_there_are():
    with pytest.raises(ConfigError) as e:
        load_suite("poetry")
    assert "code, crm, docs, marketing, reasoning" in str(e.value.remedy)
