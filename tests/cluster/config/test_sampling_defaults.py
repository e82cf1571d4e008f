"""What generation_config.json says about sampling stands where a request says nothing, and nowhere else."""

import asyncio
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from gguf import GGUFWriter
from gguf.constants import Keys
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.cli.batch.job_from_options import job_from_options
from cluster.cli.batch.run_here import batch_config
from cluster.cli.options.parser import parse
from cluster.cli.options.settings import serve_config
from cluster.cli.serve.banner import sampling_line
from cluster.config.sampling_defaults import SamplingDefaults, generation_config, read_sampling_defaults
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from workers.errors import ConfigError
from workers.protocol import SamplingParams

LLAMA_3 = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "eos_token_id": [2, 3],
    "transformers_version": "4.42.3",
}
ALL = {"temperature": 0.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 7}


def write(folder: Path, fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (LLAMA_3, SamplingDefaults(temperature=0.6, top_p=0.9)),
        (
            ALL,
            SamplingDefaults(temperature=0.5, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.1, max_tokens=7),
        ),
        ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}, SamplingDefaults()),
        ({"temperature": None, "top_k": None, "num_beams": 4}, SamplingDefaults()),
        ({"temperature": 0, "top_k": 40.0}, SamplingDefaults(temperature=0.0, top_k=40)),
        # vLLM does not read do_sample either.
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(temperature=0.7)),
    ],
)
def test_what_is_read(tmp_path: Path, fields: Any, expected: SamplingDefaults) -> None:
    write(tmp_path, fields)
    assert read_sampling_defaults(tmp_path, "auto") == expected
    assert read_sampling_defaults(tmp_path, "none") == SamplingDefaults()


def test_a_checkpoint_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path, "auto") == SamplingDefaults()


@pytest.mark.parametrize("given", ["the file", "its folder"])
def test_a_gguf_file_has_them_in_its_metadata(tmp_path: Path, given: str) -> None:
    """As llama.cpp's converter writes them, with the package's own names."""
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    keys = Keys.General
    for key, value in ((keys.SAMPLING_TEMP, 0.6), (keys.SAMPLING_TOP_P, 0.9), (keys.SAMPLING_PENALTY_REPEAT, 1.1)):
        writer.add_float32(key, value)
    writer.add_int32(keys.SAMPLING_TOP_K, 40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    location = file if given == "the file" else tmp_path
    expected = SamplingDefaults(temperature=0.6, top_p=0.9, repetition_penalty=1.1, top_k=40)
    assert read_sampling_defaults(location, "auto") == expected
    assert read_sampling_defaults(location, "none") == SamplingDefaults()
    write(tmp_path, {"temperature": 0.5})
    assert read_sampling_defaults(tmp_path, "auto") == SamplingDefaults(temperature=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature -1, which is not a number from 0 to 2."),
        ({"temperature": "0.6"}, "temperature '0.6', which is not a number"),
        ({"top_p": 1.5}, "top_p 1.5, which is not a number from 0 to 1."),
        ({"top_k": 1.5}, "top_k 1.5, which is not a whole number from -1 to"),
        ({"top_k": True}, "top_k True, which is not a whole number"),
        ('{"min_p": NaN}', "min_p nan, which is not a number"),
        ({"max_new_tokens": 0}, "max_new_tokens 0, which is not a whole number from 1 to"),
        ("[]", "is not a JSON object."),
    ],
)
def test_a_value_that_cannot_be_used_stops_the_start(tmp_path: Path, fields: Any, message: str) -> None:
    write(tmp_path, fields)
    with pytest.raises(ConfigError) as error:
        read_sampling_defaults(tmp_path, "auto")
    assert message in error.value.message
    assert str(tmp_path / "generation_config.json") in error.value.message
    assert error.value.remedy


def test_the_option(tmp_path: Path) -> None:
    assert (generation_config("auto"), generation_config("none"), generation_config("vllm")) == ("auto", "none", "none")
    other = write(tmp_path / "other", {"temperature": 0.1})
    assert generation_config(str(other)) == str(other)
    assert read_sampling_defaults(tmp_path, str(other)).temperature == 0.1
    with pytest.raises(ConfigError, match=f"{tmp_path} is neither auto, none nor a folder with generation_config.json"):
        generation_config(str(tmp_path))


def model_folder(tmp_path: Path) -> Path:
    folder = write(tmp_path / "model", LLAMA_3)
    for name in ("config.json", "tokenizer.model.v3"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    return folder


def test_serve_and_its_banner(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)

    def configured(*options: str) -> Any:
        args = parse(["serve", str(folder), *options], environ={})
        return serve_config(args, folder, "m", device="cpu")

    assert sampling_line(configured()) == (
        "temperature 0.6, top_p 0.9 where a request says nothing, from the checkpoint's generation_config.json"
    )
    assert sampling_line(configured("--generation-config", "none")) == ""
    other = write(tmp_path / "other", {"top_k": 5})
    assert sampling_line(configured("--generation-config", str(other))) == (
        f"top_k 5 where a request says nothing, from {other}/generation_config.json"
    )


@pytest.mark.parametrize(("options", "temperature"), [((), 0.6), (("--generation-config", "vllm"), None)])
def test_a_batch_alike(tmp_path: Path, options: tuple[str, ...], temperature: float | None) -> None:
    folder = model_folder(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    command = ["batch", "run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--model", str(folder)]
    args = parse([*command, *options], environ={})
    job = job_from_options(args)
    config = batch_config(Namespace(**(vars(args) | job.options)), job, folder, "m", device="cpu")
    assert config.sampling_defaults.temperature == temperature


MODEL_DEFAULTS = SamplingDefaults(
    temperature=0.5, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.1, max_tokens=7
)
OWN = {"temperature": 0.9, "top_k": 3, "top_p": 0.7, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 30}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


async def sampled(path: str, body: dict[str, Any], defaults: SamplingDefaults) -> SamplingParams:
    """What the replica was asked for."""
    replica, tokenizer = FakeReplica(max_model_len=2048), load_tokenizer(DEMO_MODEL)
    app = make_app(
        router=Router([replica]),
        tokenizer=tokenizer,
        chat_template=MistralTemplate(tokenizer),
        model_name="m",
        sampling_defaults=defaults,
    )
    async with TestClient(TestServer(app)) as client:
        response = await client.post(path, json={"model": "m"} | body)
        assert response.status == 200, await response.text()
    return replica.requests[0].sampling


def values(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in (*NEUTRAL, "max_tokens")}


COMPLETION = ("/v1/completions", {"prompt": "x"})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
async def test_a_requests_own_value_always_wins(path: str, body: dict[str, Any]) -> None:
    model = {name: getattr(MODEL_DEFAULTS, name) for name in OWN}
    assert values(await sampled(path, body, MODEL_DEFAULTS)) == model
    assert values(await sampled(path, body | dict.fromkeys(OWN), MODEL_DEFAULTS)) == model
    assert values(await sampled(path, body | OWN, MODEL_DEFAULTS)) == OWN
    assert values(await sampled(path, body | {"top_k": -1}, MODEL_DEFAULTS)) == model | {"top_k": 0}
    assert (await sampled(path, body | {"temperature": 0}, MODEL_DEFAULTS)).temperature == 0
    # A request for more tokens than the model's default gets them, and one for at least so many too.
    assert (await sampled(path, body | {"min_tokens": 9}, MODEL_DEFAULTS)).max_tokens == 9


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
async def test_without_defaults_nothing_changes(path: str, body: dict[str, Any]) -> None:
    params = await sampled(path, body, SamplingDefaults())
    assert values(params) == NEUTRAL | {"max_tokens": params.max_tokens}
    assert params.max_tokens == (16 if path == COMPLETION[0] else 2048 - 4)


async def test_a_completion_is_not_longer_than_openais_default() -> None:
    assert (await sampled(*COMPLETION, SamplingDefaults(max_tokens=512))).max_tokens == 16
    assert (await sampled(*CHAT, SamplingDefaults(max_tokens=512))).max_tokens == 512


async def test_top_p_0_of_a_model_is_greedy() -> None:
    assert (await sampled(*CHAT, SamplingDefaults(top_p=0.0, temperature=0.7))).temperature == 0
    assert (await sampled(CHAT[0], CHAT[1] | {"top_p": 0.5}, SamplingDefaults(top_p=0.0))).temperature == 1.0


async def test_the_lines_of_a_batch_on_a_server_alike(tmp_path: Path) -> None:
    replica = FakeReplica()
    line = {"custom_id": "a", "method": "POST", "url": COMPLETION[0], "body": {"model": "demo", "prompt": "x"}}
    own = line | {"custom_id": "b", "body": line["body"] | {"temperature": 0.25}}
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", "\n".join(json.dumps(row) for row in (line, own)).encode(), filename="in.jsonl")
    async with batch_app(tmp_path, [replica], sampling_defaults=MODEL_DEFAULTS) as client:
        file = await (await client.post("/v1/files", data=form)).json()
        fields = {"input_file_id": file["id"], "endpoint": COMPLETION[0], "completion_window": "24h"}
        batch = await (await client.post("/v1/batches", json=fields)).json()
        async with asyncio.timeout(20):
            while batch["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.02)
                batch = await (await client.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["request_counts"]["completed"] == 2
    assert sorted(request.sampling.temperature for request in replica.requests) == [0.25, 0.5]
    assert {request.sampling.top_k for request in replica.requests} == {40}
