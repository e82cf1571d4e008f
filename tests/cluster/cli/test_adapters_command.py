"""`tramontane adapters` against a real application, whose registry is kept here; and what --lora and its options mean."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL

from cluster.adapters import registry as transitions
from cluster.adapters.registry import find_revision
from cluster.adapters.served import ServedAdapters
from cluster.api.app import make_app
from cluster.api.server.errors import NotFoundError
from cluster.cli.adapters.start import check_adapters
from cluster.cli.main import main
from cluster.cli.options.parser import make_parser
from cluster.cli.options.settings import serve_config
from cluster.config.adapter_location import resolve_adapter
from cluster.config.serve import ServeConfig
from cluster.protocol.adapters import AdapterChange, AdapterRevision, Registry
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer
from workers.errors import CheckpointError, ConfigError, RequestError

Run = Callable[..., Awaitable[int]]


class Admin:
    """A deployment that loads everything at once. Its digests are of the sources' names."""

    def __init__(self, served: ServedAdapters) -> None:
        self.served = served

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        share: float | None = None,
        in_place: bool = False,
        base_model: str | None = None,
    ) -> AdapterRevision:
        if "missing" in source:
            raise NotFoundError(f"The adapter folder {source} does not exist.", param="lora_path")
        digest = hashlib.blake2b(source.encode(), digest_size=2).hexdigest()
        revision = AdapterRevision(
            id=f"{name}@{digest}", name=name, source=source, digest=digest, rank=8, num_bytes=933888, share=share
        )
        begun = transitions.begin(self.served.registry, revision, in_place=in_place)
        self.served.update(transitions.loaded(begun, revision.id, now=1796063075.0))
        found = find_revision(self.served.registry, revision.id)
        assert found is not None
        return found

    async def change_adapter(self, change: AdapterChange, name: str) -> Registry:
        self.served.update(getattr(transitions, change)(self.served.registry, name))
        return self.served.registry


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    served = ServedAdapters()
    tokenizer = load_tokenizer(DEMO_MODEL)
    app = make_app(
        router=Router([FakeReplica()]),
        tokenizer=tokenizer,
        chat_template=None,
        model_name="demo",
        adapters=served,
        admin=Admin(served),  # type: ignore[arg-type]
    )
    async with contextlib.AsyncExitStack() as stack:
        server = TestServer(app)
        await server.start_server()
        stack.push_async_callback(server.close)

        async def run(*arguments: str) -> int:
            return await asyncio.to_thread(main, ["adapters", *arguments, "--url", str(server.make_url("/"))])

        yield run


async def test_the_story_of_an_adapter(run, capsys):
    """As docs/adapters.md tells it."""

    async def says(*arguments: str) -> str:
        assert await run(*arguments) == 0
        return capsys.readouterr().out

    assert "No adapters are loaded." in await says("list")
    first = "support@" + hashlib.blake2b(b"owner/first", digest_size=2).hexdigest()
    second = "support@" + hashlib.blake2b(b"owner/second", digest_size=2).hexdigest()
    assert await says("load", "support", "owner/first") == f"support serves {first} on all replicas.\n"
    canary = await says("load", "support", "owner/second", "--canary", "10%")
    assert f"its canary {second} for 10 % of new requests, and {first} for the others" in canary
    lines = (await says("list")).splitlines()
    assert lines[0].split() == ["Adapter", "Revision", "State", "Serves", "From", "Rank", "MB", "Loaded"]
    assert sorted(line.split()[3:5] for line in lines[1:]) == [["10", "%"], ["90", "%"]]
    assert await says("promote", "support") == (
        f"support serves {second} for all new requests. {first} stays loaded for `tramontane adapters rollback`.\n"
    )
    listed = json.loads(await says("list", "--json"))
    assert listed["adapters"][0] | {"canary_share": 0} == {
        "name": "support",
        "current": second,
        "canary": None,
        "canary_share": 0,
        "previous": first,
    }
    assert "all" in await says("list") and "rollback" in await says("list")
    assert await says("rollback", "support") == f"support serves {first} for all new requests.\n"
    assert "retiring" in await says("list")
    assert await says("unload", "support") == "support is unloaded. Running streams end on it.\n"


async def test_a_folder_is_named_from_here(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert await run("load", "team/support", "mine") == 0
    capsys.readouterr()
    assert await run("list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["revisions"][0]["source"] == str(tmp_path / "mine")
    assert await run("promote", "team/support") == 1
    assert "no canary to promote" in capsys.readouterr().err


async def test_what_the_server_refuses_is_said(run, capsys):
    for arguments, message in (
        (("load", "support", "/missing"), "The adapter folder /missing does not exist."),
        (("load", "support", "/a", "--canary", "150%"), "'canary' is '150%'"),
        (("unload", "nobody"), "'nobody' cannot be found. The adapters are: none."),
    ):
        assert await run(*arguments) == 1
        assert message in capsys.readouterr().err


def config(*options: str) -> ServeConfig:
    args = make_parser(environ={}).parse_args(["serve", *options])
    return serve_config(args, DEMO_MODEL, "demo", device="cpu")


def test_lora_options_reach_the_engine():
    assert config().engine.enable_lora is False and config().lora == ()
    assert config("--enable-lora").engine.enable_lora
    some = config("--lora", "a=x/a", "--lora", "b=x/b=2", "--max-loras", "3", "--max-lora-rank", "16")
    assert some.lora == (("a", "x/a"), ("b", "x/b=2"))
    assert (some.engine.enable_lora, some.engine.max_loras, some.engine.max_lora_rank) == (True, 3, 16)


@pytest.mark.parametrize("text", ["support", "=path", "support="])
def test_lora_is_a_name_and_a_source(text, capsys):
    with pytest.raises(SystemExit):
        config("--lora", text)
    assert "is not NAME=PATH_OR_HUB_ID, as in support=adapters/support" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "what"), [(["demo=x/a"], "the model's own name"), (["a=x/a", "a=x/b"], "two")])
def test_names_must_differ(options, what):
    with pytest.raises(ConfigError, match=what):
        config(*(part for option in options for part in ("--lora", option)))


def test_adapters_are_checked_before_ray_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"The adapter folder /missing does not exist\. Give an existing folder"):
        check_adapters(config("--lora", "a=/missing"))
    with pytest.raises(CheckpointError, match=rf"--lora a={tmp_path}: .*adapter_config.json"):
        check_adapters(config("--lora", f"a={tmp_path}"))
    with pytest.raises(RequestError, match="cannot be the name"):
        check_adapters(config("--lora", f"a@b={tmp_path}"))


def test_a_hub_id_downloads_the_two_files(tmp_path, monkeypatch):
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_adapter("owner/name") == tmp_path
    assert asked == [("owner/name", ["adapter_config.json", "adapter_model.safetensors"])]


@pytest.mark.parametrize("source", ["./gone", "~/gone", "/gone", "one", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id(source):
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_adapter(source)


def test_a_file_is_not_an_adapter(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        resolve_adapter(str(Path(tmp_path) / "file"))
