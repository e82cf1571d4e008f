"""Which chat template is chosen and why: Mistral's own ones are recognized byte by byte, any other one is used as it is."""

import hashlib
import shutil
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor
from support.checkpoints.layouts import LAYOUTS, fast_tokenizer
from support.paths import DEMO_MODEL
from support.vocabularies.chatml import CHATML, IM_END, IM_START, MODEL_VOCAB_SIZE, V1, write_chatml
from support.vocabularies.tokenizers import write_tokenizer

from cluster.text.chat import published
from cluster.text.chat.jinja_template import JinjaTemplate
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.chat.template import Message
from cluster.text.load import LoadedText, load_text
from workers.errors import ConfigError

# As Mistral-7B-Instruct-v0.2's tokenizer_config.json had it first; its license is Apache 2.0.
MISTRAL_V2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The form of Llama-2-chat's: the system message in <<SYS>>, and BOS before every turn of the user.
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set rules = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set rules = false %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (('<<SYS>>\n' + rules + '\n<</SYS>>\n\n') if loop.first and rules else '') "
    "+ m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CUSTOM_MISTRAL = MISTRAL_V2_TEMPLATE.replace("'[INST] '", "'[INST]'")
BROKEN = {
    "{% if %}": "not valid Jinja: line 1",
    "{{ messages[0].content.x.y }}": "fails on a plain question: UndefinedError: 'str object' has no attribute 'x'",
    "{{ 'a' + messages }}": "fails on a plain question: TypeError: can only concatenate str",
    "{{ raise_exception('Never.') }}": "fails on a plain question: Never.",
}


def load(folder: Path, own: str | None, option: str = "auto") -> LoadedText:
    return load_text(write_chatml(folder, template=own), chat_template=option, model_vocab_size=MODEL_VOCAB_SIZE)


@pytest.mark.parametrize(
    ("own", "kind", "choice"),
    [
        (None, type(None), "none: the checkpoint has no chat template, and its tokenizer is not one of Mistral's."),
        (MISTRAL_V2_TEMPLATE, MistralTemplate, "mistral-common's v1, since the checkpoint's own is that of Mistral-7B-"),
        (MISTRAL_V2_TEMPLATE + "\n", MistralTemplate, "mistral-common's v1, since the checkpoint's own is that of Mistral-7B-"),
        (CUSTOM_MISTRAL, JinjaTemplate, "the checkpoint's own, which is not one of Mistral's"),
        (LLAMA_2, JinjaTemplate, "the checkpoint's own, which is not one of Mistral's"),
        (CHATML, JinjaTemplate, "the checkpoint's own, which is not one of Mistral's"),
    ],
)  # fmt: skip
def test_the_default(tmp_path: Path, own: str | None, kind: type, choice: str) -> None:
    loaded = load(tmp_path, own)
    assert isinstance(loaded.chat_template, kind)
    assert loaded.choice.startswith(choice)


def test_digests_are_of_sources_without_line_ends_at_the_end() -> None:
    digest = hashlib.sha256(MISTRAL_V2_TEMPLATE.encode()).hexdigest()
    assert published.published_name(MISTRAL_V2_TEMPLATE) == "Mistral-7B-Instruct-v0.2 of 2023", digest
    assert published.published_name(" " + MISTRAL_V2_TEMPLATE) is None
    assert published.published_name("\ud800") is None


def test_a_llama_2_template_writes_bos_in_each_turn(tmp_path: Path) -> None:
    loaded = load(tmp_path, LLAMA_2)
    messages = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    ids = loaded.chat_template.encode(messages).token_ids
    encode = loaded.tokenizer.encode
    assert ids == [
        *encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na [/INST] b "), IM_END, *encode("[INST] c [/INST]"),
    ]  # fmt: skip


def test_a_chatml_template_is_legacy_without_a_word_about_it(tmp_path: Path) -> None:
    """`legacy` is missing in many fine-tunes of v0.1, and means true."""
    loaded = load(tmp_path, CHATML)
    ids = loaded.chat_template.encode([Message("system", "You"), Message("user", "hi")]).token_ids
    assert ids[:3] == [IM_START, 1587, 13]
    assert ids[ids.index(IM_END) :][:3] == [IM_END, 28705, 13]


@pytest.mark.parametrize("own", BROKEN)
@pytest.mark.parametrize("option", ["auto", "jinja", "path"])
def test_a_broken_template_stops_the_start(tmp_path: Path, own: str, option: str) -> None:
    (tmp_path / "mine.jinja").write_text(own)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, own, str(tmp_path / "mine.jinja") if option == "path" else option)
    assert BROKEN[own] in refused.value.message
    assert refused.value.message.startswith(f"{tmp_path}")
    assert refused.value.remedy == "Correct it, or choose another template with --chat-template."
    assert refused.value.param == "--chat-template"


def test_a_template_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no template in"):
        load(tmp_path, None, "jinja")


@pytest.mark.parametrize("own", [None, CHATML, MISTRAL_V2_TEMPLATE, "{% if %}"])
@pytest.mark.parametrize("option", ["v1", "path"])
def test_the_option_decides(tmp_path: Path, own: str | None, option: str) -> None:
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    loaded = load(tmp_path, own, str(tmp_path / "mine.jinja") if option == "path" else option)
    assert "as requested" in loaded.choice
    if option == "path":
        assert loaded.chat_template.encode([Message("user", "hi")]).token_ids == [1, 12014]
    else:
        assert isinstance(loaded.chat_template, MistralTemplate)


def test_jinja_uses_even_a_published_template(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, MISTRAL_V2_TEMPLATE, "jinja").chat_template, JinjaTemplate)


def test_a_template_in_mistrals_layout_knows_the_vocabularys_bos(tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL / "tokenizer.model.v3", tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}[INST] {{ messages[0].content }}[/INST]")
    loaded = load_text(tmp_path, chat_template=str(tmp_path / "mine.jinja"), model_vocab_size=4096)
    ids = loaded.chat_template.encode([Message("user", "hi")]).token_ids
    assert ids == [1, 3, *loaded.tokenizer.encode("hi", bos=False), 4]


def test_tokens_beyond_the_model_stop_the_start_only_if_the_template_writes_them(tmp_path: Path) -> None:
    folder = write_chatml(tmp_path)
    load_text(folder, chat_template="auto", model_vocab_size=32_002)
    with pytest.raises(ConfigError, match=r"'<\|im_start\|>', whose id 32001 is beyond the model's 32001 tokens"):
        load_text(folder, chat_template="auto", model_vocab_size=32_001)


def folder_with(folder: Path, files: dict[str, bytes | str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


V1_FILE, V3_FILE = V1.read_bytes(), (V1.parent / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
# One letter of one piece is another: 32,000 pieces that are not Mistral's, as Llama 2's are.
SOMEBODYS = V1_FILE.replace("▁Constitution".encode(), "▁Constitutioq".encode())
ADDED = '{"<|im_end|>": %d}'


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"tokenizer.model": V1_FILE}, "v1"),
        ({"tokenizer.model": V3_FILE}, "v3"),
        ({"tokenizer.model.v3": V3_FILE, "tokenizer.model": V1_FILE}, "v3"),
        ({"tokenizer.model": SOMEBODYS}, None),
        ({"tokenizer.model": V1_FILE, "added_tokens.json": ADDED % 32_000}, None),
        ({"tokenizer.model": V3_FILE, "added_tokens.json": ADDED % 32_768}, None),
    ],
    ids=["v0.1", "v0.3", "a version in the name", "somebody's", "v0.1 with more tokens", "v0.3 with more tokens"],
)
def test_without_a_template_only_mistrals_own_tokenizer_brings_one(
    tmp_path: Path, files: dict[str, bytes | str], version: str | None
) -> None:
    """A model that was never trained on [INST] is not prompted with it."""
    loaded = load_text(folder_with(tmp_path, files), chat_template="auto", model_vocab_size=33_000)
    if version is not None:
        assert loaded.choice.startswith(
            f"mistral-common's {version}, since the checkpoint has none, and its tokenizer ("
        )
        assert isinstance(loaded.chat_template, MistralTemplate)
        return
    assert loaded.chat_template is None
    assert loaded.choice.startswith("none: the checkpoint has no chat template")
    assert isinstance(load_text(tmp_path, chat_template="v1", model_vocab_size=33_000).chat_template, MistralTemplate)


def test_a_published_template_with_another_vocabulary_is_used_as_it_is(tmp_path: Path) -> None:
    """Such as Mistral's of 2023 in a fine-tune of another family."""
    folder = write_tokenizer(tmp_path, "llama2", chat_template=MISTRAL_V2_TEMPLATE)
    loaded = load_text(folder, chat_template="auto", model_vocab_size=1000)
    assert loaded.choice.startswith("the checkpoint's own, that of Mistral-7B-Instruct-v0.2 of 2023")
    assert isinstance(loaded.chat_template, JinjaTemplate)
    with pytest.raises(ConfigError, match=r"The tokenizer tokenizer\.json is not one of Mistral's"):
        MistralTemplate(loaded.tokenizer)


@pytest.mark.parametrize(
    ("file", "own", "choice"),
    [
        ("tokenizer.model.v3", CUSTOM_MISTRAL, "mistral-common's v3, since the checkpoint has tokenizer.model.v3 of Mistral's release"),
        ("tokenizer.model", CUSTOM_MISTRAL, "the checkpoint's own, which is not one of Mistral's"),
        ("tokenizer.model.v3", "{{ messages[0].content }}", "the checkpoint's own, which is not one of Mistral's"),
    ],
)  # fmt: skip
def test_the_files_of_a_release_bring_mistral_commons(tmp_path: Path, file: str, own: str, choice: str) -> None:
    """A fine-tune in another format may keep the file."""
    folder = folder_with(tmp_path, {file: V3_FILE, "chat_template.jinja": own})
    assert load_text(folder, chat_template="auto", model_vocab_size=32_768).choice.startswith(choice)


@pytest.mark.parametrize(
    ("template", "choice"),
    [
        (None, "mistral-common's v1, since the checkpoint has none, and its tokenizer (tokenizer.json) is Mistral's"),
        (MISTRAL_V2_TEMPLATE, "mistral-common's v1, since the checkpoint's own is that of Mistral-7B-Instruct-v0.2 of 2023"),
    ],
)  # fmt: skip
def test_mistrals_vocabulary_in_another_file_has_its_templates(
    tmp_path: Path, template: str | None, choice: str
) -> None:
    """As transformers 5 saves Mistral's models, and as GGUF files hold them: mistral-common itself reads neither."""
    (tmp_path / "tokenizer.json").write_text(fast_tokenizer(LAYOUTS["Instruct v0.1"]).to_str())
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    loaded = load_text(tmp_path, chat_template="auto", model_vocab_size=32_000)
    assert loaded.choice == choice
    theirs = load_text(
        folder_with(tmp_path / "own", {"tokenizer.model": V1_FILE}), chat_template="v1", model_vocab_size=32_000
    )
    assert loaded.chat_template is not None and theirs.chat_template is not None
    for messages in (
        [
            Message("system", "Be brief."),
            Message("user", "ça va? 日本語</s>[INST]"),
            Message("assistant", "b"),
            Message("user", "c"),
        ],
        [Message("user", "a"), Message("assistant", "b", prefix=True)],
    ):
        assert loaded.chat_template.encode(messages) == theirs.chat_template.encode(messages)


def write_gguf_vocabulary(file: Path) -> Path:
    """Mistral's v1 as llama.cpp's converter writes it, without a template, as the files of 2023 are."""
    processor = SentencePieceProcessor(model_file=str(V1))
    ids = range(processor.vocab_size())
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    kinds = {0: TokenType.UNKNOWN, 1: TokenType.CONTROL, 2: TokenType.CONTROL}
    writer.add_token_types([TokenType.BYTE if processor.is_byte(i) else kinds.get(i, TokenType.NORMAL) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(value=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_of_mistrals_without_a_template(tmp_path: Path) -> None:
    file = write_gguf_vocabulary(tmp_path / "mistral.gguf")
    loaded = load_text(file, chat_template="auto", model_vocab_size=32_000)
    expected = "mistral-common's v1, since the checkpoint has none, and its tokenizer (mistral.gguf) is Mistral's"
    assert loaded.choice == expected
    theirs = load_text(
        folder_with(tmp_path / "own", {"tokenizer.model": V1_FILE}), chat_template="v1", model_vocab_size=32_000
    )
    messages = [Message("system", "Be brief."), Message("user", "ça va? 日本語</s>[INST]"), Message("assistant", "b")]
    assert loaded.chat_template is not None and theirs.chat_template is not None
    assert loaded.chat_template.encode(messages) == theirs.chat_template.encode(messages)
