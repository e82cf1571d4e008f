"""The option table: values, parsers, defaults, environment variables, and the page that is generated from it."""

import re
from argparse import Namespace
from dataclasses import fields

import pytest
from support.paths import ROOT
from test_plain_english import hits

from cluster.cli.main import function
from cluster.cli.options.option import Command, Option
from cluster.cli.options.page import page
from cluster.cli.options.parser import make_parser, parse
from cluster.cli.options.settings import serve_defaults
from cluster.cli.options.table import COMMANDS
from cluster.cli.options.values import parse_bytes, parse_field, parse_positive, parse_replicas, show_bytes
from cluster.config.serve import ServeConfig
from cluster.protocol.spec import ClusterSpec
from cluster.router.admission.bounds import MAX_QUEUED_TOKENS
from cluster.system.net import url_of
from workers.config import EngineConfig

ROWS = [(command, option) for command in COMMANDS for option in command.options]
row_names = [f"{command.name} {option.names[0]}" for command, option in ROWS]
by_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
by_row = pytest.mark.parametrize(("command", "option"), ROWS, ids=row_names)


def minimal(command: Command) -> list[str]:
    """A command line with nothing but what the command requires."""
    words = command.name.split()
    for option in command.options:
        if option.kind == "argument":
            words.append("x")
        elif option.is_required:
            words += [option.names[-1], "x"]
    return words


@pytest.mark.parametrize(
    ("text", "expected"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4)), ("0:2", (0, 2)), (" 2:2 ", (2, 2))]
)
def test_replicas(text, expected):
    assert parse_replicas(text) == expected


@pytest.mark.parametrize("text", ["0", "0:0", "3:2", "-1", "1:", ":2", "1:2:3", "two", "", "1.5", "99999"])
def test_no_number_of_replicas(text):
    with pytest.raises(ValueError, match="MIN:MAX"):
        parse_replicas(text)


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5", ""])
def test_not_a_positive_number(text):
    with pytest.raises(ValueError, match=r"less than 1|not a whole number"):
        parse_positive(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("top_k=40", ("top_k", 40)),
        ("user=me", ("user", "me")),
        ('user="40"', ("user", "40")),
        ("stop=", ("stop", "")),
        ('logit_bias={"5": 1}', ("logit_bias", {"5": 1})),
        ("stop=a=b", ("stop", "a=b")),
        ("top_p=NaN", ("top_p", "NaN")),
    ],
)
def test_request_fields(text, expected):
    assert parse_field(text) == expected


@pytest.mark.parametrize("words", [("bench",), ("eval",), ("batch", "run", "in.jsonl", "-o", "out.jsonl")])
def test_request_fields_are_read_by_one_rule(words, capsys):
    assert parse([*words, "--set", "top_k=40", "--set", "user=me"], environ={}).set == [("top_k", 40), ("user", "me")]
    for wrong in ("top_k", "=1"):
        with pytest.raises(SystemExit) as e:
            parse([*words, "--set", wrong], environ={})
        assert e.value.code == 2
        assert "is not FIELD=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1GiB", "1536MiB", "3KiB", "1023", "7TiB"])
def test_amounts_of_memory_are_shown_as_they_are_read(text):
    assert show_bytes(parse_bytes(text)) == text


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::1", "http://[fd00::1]:80"),
        ("gpu-7", "http://gpu-7:80"),
    ],
)
def test_the_url_shown_can_be_opened_here(host, url):
    assert url_of(host, 80) == url


@by_command
def test_every_command_can_be_run(command):
    args = parse(minimal(command), environ={"RAY_ADDRESS": "h:1"})
    assert args.run is command
    assert callable(function(command.run))
    assert args.log_level == ServeConfig.log_level


@by_row
def test_a_row_is_complete(command, option):
    assert option.help and option.help[0] != " " and not option.help.endswith("."), "help is a phrase, not a sentence"
    if option.fills is not None:
        assert set(option.fills.names) <= {field.name for field in fields(option.fills.config)}
    if option.choices and option.default is not None:
        assert option.default in option.choices


@by_command
def test_no_two_options_of_a_command_share_a_flag_or_a_value(command):
    flags = [name for option in command.options for name in option.names]
    assert len(set(flags)) == len(flags)
    values = [option.dest for option in command.options]
    assert len(set(values)) == len(values)


def helps(capsys: pytest.CaptureFixture[str], words: tuple[str, ...] = ()) -> dict[str, str]:
    """Command -> what --help prints, for every command, reached as a person would: from `tramontane --help` on."""
    with pytest.raises(SystemExit) as e:
        make_parser().parse_args([*words, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    found = {" ".join(("tramontane", *words)): text}
    for name in re.findall(r"^    ([a-z]+)\b", text.partition("  COMMAND\n")[2], re.MULTILINE):
        found |= helps(capsys, (*words, name))
    return found


def test_every_help_text_is_plain_english(capsys):
    texts = helps(capsys)
    assert {f"tramontane {command.name}" for command in COMMANDS} < texts.keys(), "the walk reaches every command"
    found = {name: hits(" ".join(text.split())) for name, text in texts.items()}
    assert not {name: each for name, each in found.items() if each}


def test_help_shows_defaults_and_environment_variables(capsys):
    text = " ".join(helps(capsys)["tramontane serve"].split())
    for words in (
        "(default: 8000)",
        "(env: TRAMONTANE_API_KEY)",
        "env: TRAMONTANE_BATCH_STORE; default:",
        "(default: 1GiB)",
        "which cloud's preemption notices to act on",
        "seconds a replica must be idle before it is removed (default: 600)",
    ):
        assert words in text


def test_defaults_come_from_their_owners():
    args = parse(["serve"], environ={})
    assert (args.port, args.drain_timeout, args.gpu_memory_utilization) == (
        ServeConfig.port,
        ClusterSpec.drain_timeout_s,
        EngineConfig.gpu_memory_utilization,
    )
    defaults = serve_defaults()
    assert defaults["max_queued_tokens"] == MAX_QUEUED_TOKENS
    engine: EngineConfig = object()  # type: ignore[assignment]  # not looked into
    assert ServeConfig(engine=engine, model_name="m", **defaults).port == ServeConfig.port


def test_an_option_of_two_flags_is_none_without_either():
    found = [parse(["serve", *words], environ={}).overlap for words in ([], ["--overlap"], ["--no-overlap"])]
    assert found == [None, True, False]


def environment(*words: str, **environ: str) -> Namespace:
    return parse(list(words), environ=environ)


def test_environment_variables_fill_what_is_missing():
    assert environment("serve", TRAMONTANE_API_KEY="k").api_key == "k"
    assert environment("serve", "--api-key", "given", TRAMONTANE_API_KEY="k").api_key == "given"
    assert environment("serve", TRAMONTANE_API_KEY="").api_key is None
    assert str(environment("serve", TRAMONTANE_API_KEYS="/k.json").api_keys) == "/k.json"
    assert environment("serve", TRAMONTANE_BATCH_STORE="postgres://h/d").batch_store == "postgres://h/d"
    assert environment("serve", "--no-batches", TRAMONTANE_BATCH_STORE="postgres://h/d").batch_store is None
    assert environment("status", TRAMONTANE_API_KEY="k").api_key == "k"
    assert environment("batch", "cancel", "x", TRAMONTANE_API_KEY="k").api_key == "k"
    assert environment("down", RAY_ADDRESS="h:1").ray_address == "h:1"
    assert environment("doctor", RAY_ADDRESS="h:1").ray_address == "h:1"
    assert environment("serve", RAY_ADDRESS="h:1").ray_address is None, "serve joins a Ray cluster only when told to"


def test_a_required_option_without_its_variable_is_asked_for(capsys):
    with pytest.raises(SystemExit) as e:
        environment("down")
    assert e.value.code == 2 and "--ray-address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench --num-requests 16", "`tramontane bench` does not take --num-requests; did you mean --requests?"),
        ("bench --num-requests=16", "does not take --num-requests; did you mean --requests?"),
        ("keys list everything", "`tramontane keys list` does not take everything. `tramontane keys list --help`"),
    ],
)
def test_what_a_command_does_not_take_is_named_with_what_it_may_mean(words, message, capsys):
    with pytest.raises(SystemExit) as e:
        parse(words.split(), environ={})
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_resume_has_what_is_given_again_and_nothing_else():
    given = vars(environment("batch", "resume", "out", "--replicas", "0:3"))
    assert given["replicas"] == (0, 3)
    remembered = {o.dest for c in COMMANDS for o in c.options if o.is_remembered}
    assert {"tensor_parallel_size", "max_num_seqs", "ray_address", "no_prefix_caching"} < remembered
    assert not (remembered - {"replicas"}) & given.keys()


def test_the_page_is_current():
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == page(), "docs/options.md does not match the option table; run `make docs` and commit the page"


def test_the_page_has_every_option():
    text = page()
    for command, option in ROWS:
        assert f"## tramontane {command.name}\n" in text
        assert row(option) in text


def row(option: Option) -> str:
    flag = option.value_name if "argument" in option.kind else option.names[-1]
    return f"`{flag}".replace("|", "\\|")
