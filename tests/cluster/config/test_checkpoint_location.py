"""What MODEL means: a folder, a Hub id, or the demo model. The Hub's client is replaced; nothing is downloaded."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from cluster.config.checkpoint_location import download_bytes, find_model, resolve_config, resolve_model
from workers.errors import ConfigError


@pytest.mark.parametrize("files", [["config.json"], ["params.json"]])
def test_a_hub_id_becomes_its_folder(monkeypatch, tmp_path, files):
    calls = []

    def download(model, *, ignore_patterns=None, **kwargs):
        calls.append(ignore_patterns)
        for name in files:
            if name != "params.json" or ignore_patterns is None:
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name") == (tmp_path, "owner/name")
    assert calls == ([["consolidated*"]] if files == ["config.json"] else [["consolidated*"], None])


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
