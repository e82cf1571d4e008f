"""The fields that request output of a certain form, in completions and chat: response_format and structured_outputs."""

import json
from typing import Any

import pytest
from support.clients.api_fields import CHAT, COMPLETIONS, Api, Row, refused

PATHS = (COMPLETIONS, CHAT)
SCHEMA = {
    "type": "object",
    "properties": {"x": {"enum": ["one", 2]}},
    "required": ["x"],
    "additionalProperties": False,
}
HOT = {"temperature": 1, "seed": 9, "max_tokens": 40}


async def follows_the_schema(api: Api, described: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": described}
    for seed in range(2):
        text = await api.text(response_format=wanted, temperature=1, seed=seed, max_tokens=60)
        assert json.loads(text)["x"] in ("one", 2)


async def starts_an_object(api: Api, response_format: dict[str, Any]) -> None:
    text = await api.text(response_format=response_format, temperature=1.5, seed=3, max_tokens=24)
    assert text.lstrip()[0] == "{"


async def changes_nothing(api: Api, response_format: dict[str, Any]) -> None:
    assert await api.text(response_format=response_format) == await api.text()


async def gives_one_of_the_colors(api: Api, schema: Any) -> None:
    assert json.loads(await api.text(structured_outputs={"json": schema}, **HOT)) in ("red", "green")


async def gives_one_of(api: Api, choices: list[str]) -> None:
    assert await api.text(structured_outputs={"choice": choices}, **HOT) in choices


async def gives_four_digits(api: Api, regex: str) -> None:
    text = await api.text(structured_outputs={"regex": regex}, **HOT)
    assert (len(text), text.isdigit()) == (4, True)


async def gives_a_sentence_of(api: Api, grammar: str) -> None:
    assert await api.text(structured_outputs={"grammar": grammar}, **HOT) in ("abd", "acd")


async def cannot_be_combined(api: Api, outputs: dict[str, Any]) -> None:
    both = {"structured_outputs": outputs, "response_format": {"type": "json_object"}}
    await api.refused(both, "structured_outputs", "only one of them")
    for name, value in (("ignore_eos", True), ("min_tokens", 2), ("bad_words", ["x"]), ("allowed_token_ids", [7])):
        await api.refused({"structured_outputs": outputs, name: value}, name, "cannot be combined")


def described(**others: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA} | others}}


async def gives_one_of_the_colors_by_its_old_name(api: Api, schema: Any) -> None:
    assert json.loads(await api.text(guided_json=schema, **HOT)) in ("red", "green")


async def gives_what_the_new_name_gives(api: Api, fields: dict[str, Any]) -> None:
    """value: the old name and its value."""
    ((name, value),) = fields.items()
    wanted = {name.removeprefix("guided_"): value}
    assert await api.text(**fields, **HOT) == await api.text(structured_outputs=wanted, **HOT)


async def gives_an_empty_object(api: Api, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_object", "schema": schema}
    assert json.loads(await api.text(response_format=wanted, **HOT)) == {}


async def is_any_object(api: Api, enabled: bool) -> None:
    text = await api.text(structured_outputs={"json_object": enabled}, temperature=1.5, seed=3, max_tokens=24)
    assert text.lstrip()[0] == "{"
    await api.refused({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one")


FULL = {"name": "x", "description": "d", "schema": SCHEMA, "strict": True}
COLORS = {"enum": ["red", "green"]}
ROWS = [
    Row("GenerationRequest.response_format", {"type": "json_object"}, starts_an_object),
    Row("GenerationRequest.response_format", {"type": "text"}, changes_nothing),
    Row("GenerationRequest.response_format", {"response_format": {"type": "xml"}}, refused("json_schema")),
    Row("SchemaFormat.json_schema", FULL, follows_the_schema),
    Row("JsonSchemaFormat.name", described(), refused("name")),
    Row("JsonSchemaFormat.description", {"name": "x", "description": "d", "schema": SCHEMA}, follows_the_schema),
    Row("JsonSchemaFormat.description", described(name="x", description=5), refused("str")),
    Row("JsonSchemaFormat.schema", {"name": "x", "schema": SCHEMA}, follows_the_schema),
    Row("JsonSchemaFormat.schema", {"type": "json_schema", "json_schema": {"name": "any"}}, starts_an_object),
    Row("JsonSchemaFormat.strict", {"name": "x", "schema": SCHEMA, "strict": False}, follows_the_schema),
    Row("JsonSchemaFormat.strict", described(name="x", strict="yes"), refused("bool")),
    Row("GenerationRequest.structured_outputs", {"regex": "a"}, cannot_be_combined),
    Row("GenerationRequest.structured_outputs", {"structured_outputs": {}}, refused("exactly one")),
    Row(
        "GenerationRequest.structured_outputs",
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        refused("exactly one"),
    ),
    Row("StructuredOutputs.json", COLORS, gives_one_of_the_colors),
    Row("StructuredOutputs.json", json.dumps(COLORS), gives_one_of_the_colors),
    Row("StructuredOutputs.json", {"structured_outputs": {"json": "{"}}, refused("JSON")),
    Row("StructuredOutputs.regex", "[0-9]{4}", gives_four_digits),
    Row("StructuredOutputs.regex", {"structured_outputs": {"regex": "("}}, refused("unclosed group")),
    Row("StructuredOutputs.choice", ["yes", "no"], gives_one_of),
    Row("StructuredOutputs.choice", [" yes", " no"], gives_one_of),
    Row("StructuredOutputs.grammar", 'start: "a" ("b" | "c") "d"', gives_a_sentence_of),
    Row("StructuredOutputs.grammar", {"structured_outputs": {"grammar": "start: ???"}}, refused("cannot be used")),
    Row("StructuredOutputs.json_object", True, is_any_object),
    Row("JsonObjectFormat.schema", {"type": "object", "additionalProperties": False}, gives_an_empty_object),
    Row("GenerationRequest.guided_json", COLORS, gives_one_of_the_colors_by_its_old_name),
    Row("GenerationRequest.guided_json", json.dumps(COLORS), gives_one_of_the_colors_by_its_old_name),
    Row(
        "GenerationRequest.guided_json", {"guided_json": COLORS}, refused("combined", structured_outputs={"regex": "a"})
    ),
    Row("GenerationRequest.guided_regex", {"guided_regex": "[0-9]{4}"}, gives_what_the_new_name_gives),
    Row("GenerationRequest.guided_choice", {"guided_choice": ["yes", "no"]}, gives_what_the_new_name_gives),
    Row("GenerationRequest.guided_grammar", {"guided_grammar": 'start: "a"'}, gives_what_the_new_name_gives),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
