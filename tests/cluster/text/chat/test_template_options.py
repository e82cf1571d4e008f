"""What a client may pass to a Jinja template: names of authors, variables, and whether the assistant's turn begins."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.paths import DEMO_MODEL
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.text.chat.jinja_template import JinjaTemplate
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.chat.template import Message, TemplateOptions
from cluster.text.chat.template_files import read_template_files
from cluster.text.tokenizer import load_tokenizer
from workers.errors import RequestError

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = (
    "{{ bos_token }}{% if style is defined %}{{ style.name }}: {% endif %}{% for m in messages %}"
    "{{ m['role'] }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if not enable_thinking | default(true) %}(quick) {% endif %}{% endif %}"
)
MESSAGES = [Message("user", "Hi", name="Ann"), Message("assistant", "Yes"), Message("user", "So?", name="Bob")]


@pytest.fixture
def template(tmp_path: Path) -> JinjaTemplate:
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return JinjaTemplate(TOKENIZER, read_template_files(tmp_path), model_vocab_size=TOKENIZER.vocab_size)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"variables": {"enable_thinking": False}},
        {"variables": {"style": {"name": "dry"}, "unread": [1]}},
    ],
    ids=str,
)
def test_the_prompt_is_that_of_transformers(template: JinjaTemplate, options: dict[str, Any]) -> None:
    found = template.encode(MESSAGES, options=TemplateOptions(**options)).token_ids
    conversation = [{"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {}) for m in MESSAGES]
    (expected,), _ = render_jinja_template(
        [conversation],
        chat_template=TEMPLATE,
        add_generation_prompt=options.get("add_generation_prompt", True),
        bos_token="<s>",
        eos_token="</s>",
        **options.get("variables", {}),
    )
    assert "".join(expected.split()) == "".join("".join(TOKENIZER.token_text(i) for i in found).split())


def test_special_tokens_in_a_variable_stay_text(template: JinjaTemplate) -> None:
    plain = template.encode(MESSAGES).token_ids
    options = TemplateOptions(variables={"style": {"name": "a</s>b<s>"}})
    found = template.encode(MESSAGES, options=options).token_ids
    assert (found.count(1), found.count(2)) == (plain.count(1), plain.count(2))
    assert TOKENIZER.decode(found).startswith("a</s>b<s>: user Ann: Hi")


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "add_generation_prompt"])
def test_a_variable_does_not_replace_the_servers_own(template: JinjaTemplate, name: str) -> None:
    with pytest.raises(RequestError, match=f"'chat_template_kwargs' cannot set '{name}'") as error:
        template.encode(MESSAGES, options=TemplateOptions(variables={name: "x"}))
    assert error.value.param == "chat_template_kwargs"


def test_a_template_knows_what_it_reads(template: JinjaTemplate) -> None:
    for name in ("name", "enable_thinking", "style", "add_generation_prompt", "role"):
        assert template.reads(name)
    for name in ("thinking", "custom_instructions"):
        assert not template.reads(name)
    assert not MistralTemplate(TOKENIZER).reads("name")
