"""What `bench` and `eval` share: the model that a server offers, and the command as their reports show it. Knows no load and no suite."""

import shlex
import sys

import msgspec

from cluster.cli.client import Client
from workers.errors import ConfigError


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def first_model(client: Client) -> str:
    """The first of /v1/models. Raises ConfigError."""
    try:
        models = client.get("/v1/models", _Models).data
    except ConfigError as e:
        if e.param != "--url":
            raise
        raise ConfigError(
            f"The server at {client.url} has no /v1/models in OpenAI's form.",
            remedy="Check --url, which ends before /v1, or name the model with --model.",
            param="--url",
        ) from e
    if not models:
        raise ConfigError(
            f"The server at {client.url} serves no model.", remedy="Load one there, or name it with --model."
        )
    return models[0].id


def shown_command() -> str:
    """The command line without keys."""
    words = ["tramontane", *sys.argv[1:]]
    for i, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in ("--api-key", "--compare-api-key"):
            if equals:
                words[i] = f"{option}=..."
            elif i + 1 < len(words):
                words[i + 1] = "..."
    return shlex.join(words)
