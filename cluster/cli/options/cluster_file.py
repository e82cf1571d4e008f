"""The file of `serve --config`: the models of one server, in YAML, each with the options of `serve` by their names.

Knows the file's form and which option belongs where; an option's own row turns its text into a value, as on the command line. What stands
at the top of the file is about the server, or counts for every deployment that does not say otherwise. Errors name the file, the line and
the option.
"""

import difflib
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.cli.options.option import Option
from cluster.cli.options.rows.serve import CONFIG, DEPLOYMENT_OPTIONS, OWN_OPTIONS, SERVE
from cluster.cli.options.rows.shared import NAME
from cluster.protocol.names import full_name
from workers.errors import ConfigError

DEPLOYMENTS = "deployments"
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Given:
    """One option in the file."""

    value: Any
    line: int


@dataclass(frozen=True, kw_only=True)
class DeploymentEntry:
    """`name`: its own among several; None where there is only one and it has none. `options`: by their attribute of the arguments."""

    name: str | None
    line: int
    options: Mapping[str, Given]


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """`options`: those at the top."""

    path: Path
    options: Mapping[str, Given]
    deployments: tuple[DeploymentEntry, ...]

    def arguments(self, args: Namespace) -> list[Namespace]:
        """The arguments of `serve` for each deployment. args: the command line's, where `given` names those that it gives.

        A deployment's own value wins, then the command line, then the top of the file. Raises ConfigError for what has no place beside
        the file.
        """
        for option in OWN_OPTIONS:
            if option.dest in args.given:
                raise ConfigError(
                    f"{_shown(option)} has no place beside --config: it belongs to one model.",
                    remedy=f"Write it into {self.path}, in the deployment that it is for.",
                    param=_shown(option),
                )
        common = {dest: given.value for dest, given in self.options.items() if dest not in args.given}
        made = []
        for entry in self.deployments:
            own = {dest: given.value for dest, given in entry.options.items()}
            merged = Namespace(**(vars(args) | common | own))
            merged.name = full_name(merged.name, entry.name)
            made.append(merged)
        return made

    def blame(self, index: int, error: ConfigError) -> ConfigError:
        """The error of a deployment's configuration, with the place in this file that it is about."""
        entry, option = self.deployments[index], (error.param or "").lstrip("-").replace("-", "_")
        given = entry.options.get(option) or self.options.get(option)
        which = f" of the deployment {entry.name!r}" if entry.name is not None else ""
        return ConfigError(
            f"{self.path}, line {entry.line if given is None else given.line}{which}: {error.message}",
            remedy=error.remedy,
            param=error.param,
        )


def read_cluster_file(path: Path) -> ClusterFile:
    """Raises ConfigError."""
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> ClusterFile:
        top = self._pairs(self._parsed(), "The file")
        node = next((value for key, _, value in top if key == DEPLOYMENTS), None)
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._error(
                node,
                f"{DEPLOYMENTS!r} must be a list with at least one deployment.",
                remedy="Write it like:\ndeployments:\n  - name: chat\n    model: FOLDER, GGUF FILE OR HUB ID",
            )
        known = {key_of(o): o for o in SERVE.options if o not in (CONFIG, *OWN_OPTIONS)}
        options = self._options(
            [pair for pair in top if pair[0] != DEPLOYMENTS],
            known,
            elsewhere={key_of(o): "belongs to one deployment; write it there" for o in OWN_OPTIONS},
            others=(DEPLOYMENTS,),
        )
        return ClusterFile(path=self._path, options=options, deployments=self._deployments(node.value))

    def _deployments(self, nodes: Sequence[yaml.Node]) -> tuple[DeploymentEntry, ...]:
        entries = [self._deployment(node, is_only=len(nodes) == 1) for node in nodes]
        for i, entry in enumerate(entries):
            if entry.name in [other.name for other in entries[:i]]:
                raise self._error(
                    nodes[i],
                    f"Two deployments are named {entry.name!r}.",
                    remedy="Give one of them another 'name'.",
                )
        return tuple(entries)

    def _deployment(self, node: yaml.Node, *, is_only: bool) -> DeploymentEntry:
        pairs = self._pairs(node, "A deployment")
        known = {key_of(o): o for o in DEPLOYMENT_OPTIONS}
        server = [o for o in SERVE.options if o not in (CONFIG, NAME, *DEPLOYMENT_OPTIONS)]
        options = self._options(
            [pair for pair in pairs if pair[0] != "name"],
            known,
            elsewhere={key_of(o): "is about the whole server; write it at the top of the file" for o in server},
            others=("name",),
        )
        if "model" not in options:
            raise self._error(
                node,
                "The deployment has no 'model'.",
                remedy="Name a folder, a GGUF file or an id on the Hugging Face Hub.",
            )
        named = next((value for key, _, value in pairs if key == "name"), None)
        name = None if named is None else self._text(named, "name")
        if name is None and not is_only:
            name = _name_of(options)
        if name is not None and not _NAME.fullmatch(name):
            raise self._error(
                named or node,
                f"{name!r} cannot be the name of a deployment.",
                remedy="Give it a 'name' of at most 42 lower-case letters, digits and hyphens.",
            )
        return DeploymentEntry(name=name, line=_line(node), options=options)

    def _options(
        self,
        pairs: Sequence[tuple[str, yaml.Node, yaml.Node]],
        known: Mapping[str, Option],
        *,
        elsewhere: Mapping[str, str],
        others: Sequence[str],
    ) -> dict[str, Given]:
        """elsewhere: options that have no place here, with the reason. others: further keys that do."""
        found = {}
        for key, key_node, value in pairs:
            if key in elsewhere:
                raise self._error(key_node, f"{key!r} {elsewhere[key]}.")
            if key not in known:
                near = difflib.get_close_matches(key.replace("_", "-"), [*known, *elsewhere, *others], n=1)
                raise self._error(
                    key_node,
                    f"There is no option {key!r}.",
                    remedy=f"Did you mean {near[0]!r}?"
                    if near
                    else "docs/options.md lists those of `tramontane serve`.",
                )
            found[known[key].dest] = Given(self._value(known[key], key, value), _line(key_node))
        return found

    def _value(self, option: Option, key: str, node: yaml.Node) -> Any:
        if option.kind in ("switch", "toggle"):
            text = self._text(node, key).lower()
            if text not in (*_TRUE, *_FALSE):
                raise self._error(node, f"{key!r} is {text!r}.", remedy="Write true or false.")
            return text in _TRUE
        if option.kind != "list":
            return self._converted(option, key, node, self._text(node, key))
        if isinstance(node, yaml.MappingNode):  # lora: {NAME: PATH}
            texts = [(value, f"{name}={self._text(value, key)}") for name, _, value in self._pairs(node, repr(key))]
        else:
            items = node.value if isinstance(node, yaml.SequenceNode) else [node]
            texts = [(item, self._text(item, key)) for item in items]
        return [self._converted(option, key, item, text) for item, text in texts]

    def _converted(self, option: Option, key: str, node: yaml.Node, text: str) -> Any:
        if option.choices and text not in option.choices:
            raise self._error(node, f"{key!r} is {text!r}.", remedy=f"Use one of {', '.join(option.choices)}.")
        try:
            return option.parse(text)
        except ValueError as e:
            reason = f"{text!r} is not a number" if option.parse in (int, float) else str(e)
            raise self._error(node, f"{key!r}: {reason}.") from e

    def _parsed(self) -> yaml.Node:
        try:
            node = yaml.compose(self._path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
            raise ConfigError(
                f"--config {self._path} cannot be read: {reason}.", remedy="Check the path.", param="--config"
            ) from e
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            where = "" if mark is None else f", line {mark.line + 1}"
            raise ConfigError(
                f"{self._path}{where}: This is not valid YAML: {getattr(e, 'problem', None) or e}.", param="--config"
            ) from e
        if node is None:
            raise ConfigError(f"--config {self._path} is empty.", param="--config")
        return node

    def _pairs(self, node: yaml.Node, what: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
        """Key, the key's node and the value's node of a mapping."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} must be a mapping of options, such as model: FOLDER.")
        pairs = [(self._text(key, "a name"), key, value) for key, value in node.value]
        for i, (key, key_node, _) in enumerate(pairs):
            if key in [other for other, _, _ in pairs[:i]]:
                raise self._error(key_node, f"{key!r} is there twice.", remedy="Remove one of them.")
        return pairs

    def _text(self, node: yaml.Node, key: str) -> str:
        """As it is written: `replicas: 0:2` is two numbers, not seconds."""
        if not isinstance(node, yaml.ScalarNode) or (node.tag == _NULL and not node.value):
            raise self._error(node, f"{key!r} needs a single value.")
        return str(node.value)

    def _error(self, node: yaml.Node | None, message: str, *, remedy: str | None = None) -> ConfigError:
        where = "" if node is None else f", line {_line(node)}"
        return ConfigError(f"{self._path}{where}: {message}", remedy=remedy, param="--config")


def key_of(option: Option) -> str:
    """How the file writes an option: its long flag without the hyphens, or the name of an argument."""
    return next((name for name in option.names if name.startswith("--")), option.names[0]).lstrip("-")


def _shown(option: Option) -> str:
    return next((name for name in option.names if name.startswith("--")), option.value_name)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _name_of(options: Mapping[str, Given]) -> str:
    """From the name of the model."""
    given = options.get("served_model_name") or options["model"]
    last = str(given.value).rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:42].strip("-")
