"""What MODEL means: a folder, a Hub id, or the demo model. The Hub's client is replaced; nothing is downloaded."""

from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects
from support.checkpoints.layouts import LAYOUTS, write_layout

from cluster.config.checkpoint_check import check_checkpoint
from cluster.config.checkpoint_location import download_bytes, find_model, resolve_config, resolve_model
from cluster.text.load import load_text
from workers.errors import ConfigError

# What is published next to weights: what a checkpoint means, and what nobody should run, or need.
WANTED = [
    "config.json",
    "generation_config.json",
    "params.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.json",
    "tokenizer_config.json",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
]
UNWANTED = [
    ".gitattributes",
    "README.md",
    "modeling_mistral.py",
    "tokenization_mistral.py",
    "tokenizer.py",
    "additional_chat_templates/setup.py",
    "consolidated.safetensors",
    "fp8/model.safetensors",
    "model.gguf",
    "pytorch_model.bin",
    "training_args.bin",
    "onnx/config.json",
]


def fake_hub(monkeypatch, folder, sizes, *, content=None):
    """A Hub with one repository: the Hub's own filter decides what is downloaded. Returns the calls' names of downloaded files.

    content: a folder with the files; without it, they are empty.
    """
    calls = []

    def snapshot_download(model, *, revision=None, allow_patterns=None, ignore_patterns=None, local_files_only=False):
        names = filter_repo_objects(sizes, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        calls.append(list(names))
        for name in calls[-1]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            if content is not None:
                (folder / name).write_bytes((content / name).read_bytes())
        return str(folder)

    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: list(sizes))
    return calls


def test_all_that_a_checkpoint_means_is_downloaded_and_nothing_else(monkeypatch, tmp_path):
    calls = fake_hub(monkeypatch, tmp_path, dict.fromkeys([*WANTED, *UNWANTED], 1))
    assert resolve_model("owner/name") == (tmp_path, "owner/name")
    assert calls == [WANTED]
    assert download_bytes("owner/name") == len(WANTED)


@pytest.mark.parametrize("files", [["params.json"], ["config.json"], ["config.json", "params.json"]])
def test_weights_in_mistrals_layout_are_downloaded_if_there_are_no_others(monkeypatch, tmp_path, files):
    calls = fake_hub(monkeypatch, tmp_path, dict.fromkeys((*files, "consolidated.safetensors"), 1))
    resolve_model("owner/name")
    assert calls == [files, [*files, "consolidated.safetensors"]]
    assert download_bytes("owner/name") == len(calls[1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.Q4_K_M.gguf", "a.Q8_0.gguf"], "owner/name has 2 GGUF models (a.Q4_K_M.gguf, a.Q8_0.gguf)."),
        (["model.ggml"], "owner/name has weights in the old GGML format (model.ggml), which is not supported."),
        (
            ["adapter_config.json", "adapter_model.bin"],
            "owner/name has a LoRA adapter (adapter_config.json), not a model.",
        ),
        (["config.json", "pytorch_model.bin"], "owner/name has the weights only as a pickle file (pytorch_model.bin)"),
        (["README.md"], "owner/name has no model, but README.md"),
        ([], "owner/name is empty."),
    ],
)
def test_a_repository_without_a_model_is_named(monkeypatch, tmp_path, files, message):
    fake_hub(monkeypatch, tmp_path, dict.fromkeys(files, 1))
    with pytest.raises(ConfigError) as e:
        resolve_model("owner/name")
    assert e.value.message.startswith(message)


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("model.ggml", "is a file in the old GGML format, which is not supported.", "Give a folder with config.json"),
        ("model.safetensors", "is a file, not a model folder.", "Give its folder, "),
        ("notes.txt", "is a file, not a model folder.", "Give a folder with config.json"),
    ],
)
def test_a_file_instead_of_a_folder(tmp_path, name, message, remedy):
    (tmp_path / name).touch()
    for resolve in (resolve_model, find_model, resolve_config):
        with pytest.raises(ConfigError) as e:
            resolve(str(tmp_path / name))
        assert e.value.message == f"{tmp_path / name} {message}" and e.value.remedy.startswith(remedy)


def test_a_gguf_file_is_a_model(tmp_path):
    """Given itself, as any of its parts, or as the only one in its folder."""
    parts = [tmp_path / f"tiny-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.touch()
    assert resolve_model(str(parts[1])) == (parts[0], "tiny")
    assert resolve_model(str(tmp_path)) == (parts[0], tmp_path.name)
    (tmp_path / "tiny.Q8_0.gguf").touch()
    found = resolve_model(str(tmp_path), gguf_file="tiny.Q8_0.gguf")
    assert found == (tmp_path / "tiny.Q8_0.gguf", "tiny.Q8_0")
    assert find_model(str(tmp_path), gguf_file=parts[0].name) == parts[0]
    assert resolve_config(str(tmp_path), gguf_file=parts[0].name) == parts[0]


@pytest.mark.parametrize(
    ("gguf_file", "message", "remedy"),
    [
        (None, "has 2 GGUF models (a.gguf, b.gguf).", "Name one with --gguf-file."),
        ("c.gguf", "has no file c.gguf.", "Use one of a.gguf, b.gguf."),
        (
            "../a.gguf",
            "--gguf-file ../a.gguf is not the name of a GGUF file in MODEL.",
            "Give a name that ends with .gguf",
        ),
        ("a.bin", "--gguf-file a.bin is not the name of a GGUF file in MODEL.", "Give a name that ends with .gguf"),
    ],
)
def test_which_of_several_gguf_files(tmp_path, monkeypatch, gguf_file, message, remedy):
    """The same in a folder and in a repository."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    fake_hub(monkeypatch, tmp_path / "hub", {"a.gguf": 1, "b.gguf": 1})
    for model in (str(folder), "owner/name"):
        with pytest.raises(ConfigError) as e:
            resolve_model(model, gguf_file=gguf_file)
        assert e.value.message in (message, f"{model} {message}") and e.value.remedy.startswith(remedy)
        assert e.value.param == "--gguf-file"


def test_gguf_file_without_effect_is_refused(tmp_path):
    (tmp_path / "a.gguf").touch()
    for model in (str(tmp_path / "a.gguf"), None):
        with pytest.raises(ConfigError, match="--gguf-file has no effect"):
            resolve_model(model, gguf_file="a.gguf")


def test_one_gguf_file_of_a_repository_is_downloaded(monkeypatch, tmp_path):
    names = ["config.json", "README.md", "a.Q8_0.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    calls = fake_hub(monkeypatch, tmp_path, dict.fromkeys(names, 3))
    assert resolve_model("owner/name", gguf_file="a-00001-of-00002.gguf") == (tmp_path / names[3], "owner/name")
    assert calls == [names[3:]]
    assert download_bytes("owner/name", gguf_file="a.Q8_0.gguf") == 3
    assert download_bytes("owner/name", gguf_file="a-00002-of-00002.gguf") == 6


def test_the_only_gguf_file_of_a_repository_needs_no_option(monkeypatch, tmp_path):
    names = ["README.md", "a.Q4_K_M.gguf", "mmproj-a.gguf"]
    calls = fake_hub(monkeypatch, tmp_path, dict.fromkeys(names, 3))
    assert resolve_model("owner/name") == (tmp_path / "a.Q4_K_M.gguf", "owner/name")
    assert calls[-1] == ["a.Q4_K_M.gguf"] and download_bytes("owner/name") == 3


def test_the_plan_of_a_gguf_file_on_the_hub_says_how_to_get_it(monkeypatch, tmp_path):
    """Its configuration is in the file itself, which may have gigabytes."""
    fake_hub(monkeypatch, tmp_path, {})
    with pytest.raises(ConfigError, match=r"a\.gguf of owner/name is not on this machine") as e:
        resolve_config("owner/name", gguf_file="a.gguf")
    assert "`hf download owner/name a.gguf`" in e.value.remedy


def test_without_a_model_the_demo_is_served():
    folder, name = resolve_model(None)
    assert (folder / "config.json").is_file()
    assert name == "demo_model"


def test_a_folder_is_served_under_its_own_name(tmp_path):
    assert resolve_model(str(tmp_path)) == (tmp_path, tmp_path.name)
    assert find_model(str(tmp_path)) == resolve_config(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(model):
    for resolve in (resolve_model, find_model, resolve_config):
        with pytest.raises(ConfigError) as e:
            resolve(model)
        assert e.value.message == f"The model folder {model} does not exist."
        assert e.value.param == "MODEL"


def hub_error(kind):
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
    return kind("from the Hub", response=response)


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (hub_error(GatedRepoError), "is gated on the Hub", "HF_TOKEN"),
        (hub_error(RevisionNotFoundError), "has no revision 'v9'", "branches, tags or commits"),
        (hub_error(RepositoryNotFoundError), "no Hub model of this id", "HF_TOKEN"),
        (HFValidationError("too long"), "neither a folder here nor a valid Hub id: too long", "owner/name"),
        (httpx.ConnectError("no network"), "the Hub could not be reached", "Check the network"),
        (OSError("no network"), "the Hub could not be reached", "Check the network"),
    ],
)
def test_what_the_hub_refuses_has_a_remedy(monkeypatch, error, message, remedy):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    for resolve in (resolve_model, resolve_config, download_bytes):
        with pytest.raises(ConfigError) as e:
            resolve("owner/name", revision="v9")
        assert message in e.value.message and remedy in e.value.remedy


@pytest.mark.parametrize(
    ("layout", "choice"),
    [
        ("saved by transformers 5", "the checkpoint's own, which is not one of Mistral's (ChatML)"),
        ("Mistral Small 24B", "mistral-common's v7, since the checkpoint has none, and its tokenizer (tekken.json) is Mistral's"),
    ],
)  # fmt: skip
def test_what_is_downloaded_is_enough_to_chat(monkeypatch, tmp_path, layout, choice):
    """A missing chat_template.jinja would show as a prompt in another format, and in no error."""
    published, cache = write_layout(tmp_path / "published", layout), tmp_path / "cache"
    names = [str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()]
    fake_hub(monkeypatch, cache, dict.fromkeys(names, 1), content=published)
    folder, _ = resolve_model("owner/name")
    check_checkpoint(folder)
    vocab_size = LAYOUTS[layout].vocab_size
    assert load_text(folder, chat_template="auto", model_vocab_size=vocab_size).choice == choice
