"""`serve` with a platform's environment: what is not given comes from there, and what is given wins."""

import pytest

from cluster.cli.main import main
from cluster.cli.options.rows.serve import SERVE
from cluster.cli.options.settings import settings_of
from cluster.cli.serve.platform import parse_here
from cluster.config.serve import ServeConfig
from workers.config import EngineConfig
from workers.errors import ConfigError

VERTEX = {
    "AIP_HTTP_PORT": "8085",
    "AIP_HEALTH_ROUTE": "/healthy",
    "AIP_PREDICT_ROUTE": "/predict",
    "AIP_STORAGE_URI": "gs://bucket/model",
}


def test_the_platform_gives_port_model_and_readiness():
    args = parse_here(["serve"], environ=VERTEX)
    assert (args.host, args.port, args.model, args.public_health) == ("0.0.0.0", 8085, "gs://bucket/model", True)


def test_options_that_are_given_win():
    args = parse_here(["serve", "owner/name", "--port", "9000", "--strict"], environ=VERTEX)
    assert (args.port, args.model, args.strict) == (9000, "owner/name", True)
    args = parse_here(["serve", "--platform", "none"], environ=VERTEX)
    assert (args.host, args.port, args.model) == ("127.0.0.1", 8000, None)
    args = parse_here(["serve"], environ=VERTEX | {"TRAMONTANE_PLATFORM": "none"})
    assert args.port == 8000


def test_other_commands_are_not_changed():
    args = parse_here(["generate"], environ=VERTEX)
    assert args.model is None


def test_a_platform_without_a_model_does_not_serve_the_demo_model():
    environ = {"SAGEMAKER_BIND_TO_PORT": "8080"}
    with pytest.raises(ConfigError, match=r"Amazon SageMaker was recognized .*, but it brought no model\. Name one"):
        parse_here(["serve"], environ=environ)
    assert parse_here(["serve", "a/b"], environ=environ).model == "a/b"


def test_a_wrong_variable_is_an_error_of_the_command(capsys, monkeypatch):
    for name, value in (VERTEX | {"AIP_HTTP_PORT": "x"}).items():
        monkeypatch.setenv(name, value)
    assert main(["serve"]) == 2
    assert "AIP_HTTP_PORT is 'x', which is not a port." in capsys.readouterr().err


def test_only_a_platform_may_serve_everyone_without_a_key(monkeypatch):
    for name, value in VERTEX.items():
        monkeypatch.setenv(name, value)
    engine = {"engine": EngineConfig, "model_name": "m"}  # a stand-in: nothing here reads it
    args = parse_here(["serve"])
    settings = settings_of(ServeConfig, args, SERVE.options) | engine
    config = ServeConfig(**settings)
    assert config.platform is not None and config.platform.predict_path == "/predict"
    assert not config.is_local
    args = parse_here(["serve", "--platform", "none", "--host", "0.0.0.0"])
    with pytest.raises(ConfigError, match="would open the server to the network without a key"):
        ServeConfig(**(settings_of(ServeConfig, args, SERVE.options) | engine))
