"""The file of `serve --config`: the same configuration as the command line gives, and errors that name the place."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.paths import DEMO_MODEL

from cluster.cli.options.cluster_file import read_cluster_file
from cluster.cli.options.parser import parse
from cluster.cli.serve.models import cluster_config, models_of
from cluster.config.cluster import ClusterConfig
from workers.errors import ConfigError

ENVIRONMENT = {"TRAMONTANE_API_KEY": "from-the-environment"}


def configured(path: Path, text: str, *options: str, environ: dict[str, str] | None = None) -> ClusterConfig:
    path.write_text(text)
    models = models_of(parse(["serve", "--config", str(path), *options], environ=environ or {}))
    return cluster_config(models, [model.configure("cpu") for model in models])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def test_one_deployment_is_what_the_command_line_gives(path):
    options = ["--port", "0", "--api-key", "k", "--replicas", "0:2", "--dtype", "float32", "--no-prefix-caching"]
    options += ["--kv-cache-memory", "64MiB", "--cors-origin", "https://a.example", "--served-model-name", "demo"]
    [model] = models_of(parse(["serve", str(DEMO_MODEL), *options, "--overlap"], environ={}))
    text = f"""
port: 0
api-key: k
cors-origin: [https://a.example]
deployments:
  - model: {DEMO_MODEL}
    replicas: 0:2        # a number of seconds where YAML is read as YAML 1.1
    dtype: float32
    no-prefix-caching: yes
    kv-cache-memory: 64MiB
    served-model-name: demo
    overlap: true
"""
    assert configured(path, text) == ClusterConfig((model.configure("cpu"),))


def test_several_deployments_share_the_server_and_have_names_of_their_own(path):
    text = f"""
name: team
drain-timeout: 7
max-model-len: 256
deployments:
  - name: chat
    model: {DEMO_MODEL}
    served-model-name: Chat
    replicas: "1:3"
    lora: {{sql: /a, crm: /b}}
  - model: {DEMO_MODEL}
    served-model-name: Small Code
    max-model-len: 128
    lora: [docs=/c]
"""
    chat, code = configured(path, text).deployments
    assert (chat.deployment, code.deployment) == ("team.chat", "team.small-code")
    assert [config.drain_timeout_s for config in (chat, code)] == [7.0, 7.0]
    assert [config.engine.max_model_len for config in (chat, code)] == [256, 128]
    assert (chat.lora, code.lora) == ((("sql", "/a"), ("crm", "/b")), (("docs", "/c"),))
    assert (chat.min_replicas, chat.max_replicas, code.max_replicas) == (1, 3, 1)
    own = {"deployment": "x", "model_name": "", "lora": (), "engine": None}
    assert replace(chat, **own, max_replicas=1) == replace(code, **own)


def test_the_command_line_wins_over_the_top_of_the_file_and_the_environment_as_well(path):
    text = (
        f"port: 9000\nhost: 127.0.0.2\napi-key: from-the-file\nblock-size: 8\ndeployments: [{{model: {DEMO_MODEL}}}]\n"
    )
    server = configured(path, text, "--port", "8000", "--block-size", "32", environ=ENVIRONMENT).server
    assert (server.port, server.host, server.api_key) == (8000, "127.0.0.2", "from-the-environment")
    assert server.engine.block_size == 32
    own = text.replace(f"model: {DEMO_MODEL}", f"model: {DEMO_MODEL}, block-size: 64")
    assert configured(path, own, "--block-size", "32").server.engine.block_size == 64, "a deployment's own value wins"


MODEL_LINE = f"  - model: {DEMO_MODEL}\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "is empty"),
        ("port: [", 1, "not valid YAML"),
        ("- a\n", 1, "must be a mapping"),
        ("port: 1\n", None, "'deployments' must be a list"),
        ("deployments: []\n", 1, "'deployments' must be a list"),
        ("prot: 1\ndeployments:\n" + MODEL_LINE, 1, "no option 'prot'. Did you mean 'port'?"),
        ("deployments:\n" + MODEL_LINE + "    tensor_parallel_size: 2\n", 3, "Did you mean 'tensor-parallel-size'?"),
        ("deployments:\n" + MODEL_LINE + "    port: 2\n", 3, "'port' is about the whole server"),
        ("revision: main\ndeployments:\n" + MODEL_LINE, 1, "'revision' belongs to one deployment"),
        ("deployments:\n  - replicas: 1\n", 2, "has no 'model'"),
        ("deployments:\n" + MODEL_LINE + "    replicas: many\n", 3, "'many' is not a number of replicas"),
        ("deployments:\n" + MODEL_LINE + "    dtype: int3\n", 3, "'dtype' is 'int3'. Use one of auto, float32"),
        ("deployments:\n" + MODEL_LINE + "    scale-down-after: soon\n", 3, "'soon' is not a number"),
        ("deployments:\n" + MODEL_LINE + "    scale-down-after: 0\n", 3, "--scale-down-after 0 is not a valid time"),
        ("deployments:\n" + MODEL_LINE + "    deterministic: maybe\n", 3, "Write true or false"),
        ("deployments:\n" + MODEL_LINE + "    dtype:\n", 3, "'dtype' needs a single value"),
        ("deployments:\n" + MODEL_LINE + "    dtype: auto\n    dtype: auto\n", 4, "'dtype' is there twice"),
        ("deployments:\n" + MODEL_LINE + "    max-model-len: 9999999\n", 3, "more than the model supports"),
        ("deployments:\n" + MODEL_LINE + "    lora: {a: }\n", 3, "'lora' needs a single value"),
        ("deployments:\n" + MODEL_LINE + "    name: Chat\n", 3, "cannot be the name of a deployment"),
        ("deployments:\n" + 2 * MODEL_LINE, 3, "Two deployments are named 'demo-model'"),
        ("deployments:\n  - model: /no/such\n    name: a\n" + MODEL_LINE, 2, "of the deployment 'a': "),
        ("deployments:\n  - {name: a, model: M}\n  - {name: b, model: M}\n".replace("M", str(DEMO_MODEL)), None,
         "have the same name in requests"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_place(path, text, line, message):
    with pytest.raises(ConfigError) as error:
        configured(path, text)
    said = str(error.value)
    assert str(path) in said and message in said, said
    assert (f"{path}, line {line}" in said) if line is not None else (", line" not in said), said


def test_what_belongs_to_one_model_has_no_place_on_the_command_line(path):
    text = "deployments:\n" + MODEL_LINE
    for option, shown in ((["MODEL"], "MODEL"), (["--lora", "a=/b"], "--lora"), (["--revision", "x"], "--revision")):
        with pytest.raises(ConfigError, match=f"{shown} has no place beside --config"):
            configured(path, text, *option)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_cluster_file(tmp_path / "missing.yaml")
