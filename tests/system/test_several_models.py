"""Two models of one `tramontane serve --config`, under load: a replica, a controller and a model that sleeps disturb no other model.

One server for all tests, in this order. Both models are the demo model: in bfloat16 on two replicas, and in float32, scaled to zero when
nobody asks, with an adapter.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from support.checkpoints.adapters import write_adapter
from support.paths import DEMO_MODEL
from support.servers.system_server import API_KEY, Server

from cluster.keys.file import add_key
from cluster.keys.key import Limits, new_key
from workers.checkpoint.model_config import load_model_config

MODELS = ("demo_model", "small")
BODY = {"prompt": "def fibonacci(n):", "max_tokens": 120, "temperature": 1.0, "seed": 5, "ignore_eos": True}


@dataclass
class World:
    """secret: of the key that may use `small` only."""

    server: Server
    secret: str
    texts: dict[str, str]

    def client(self, secret: str = API_KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=secret, max_retries=0, timeout=60)

    def of(self, member: str, state: str | None = "ready") -> dict[str, dict]:
        return {name: r for name, r in self.server.replicas(state).items() if name.startswith(f"{member}-")}

    def wait_busy(self, member: str) -> str:
        """The replica with the most sequences, once one has some. From the gateway: the controller's last report may be too old."""
        busiest: list[str] = []

        def is_busy() -> bool:
            _, health = self.server.health()
            running = {r["id"]: r["num_running"] for r in health["replicas"] if r["id"].startswith(f"{member}-")}
            busiest[:] = sorted((name for name, num_running in running.items() if num_running), key=running.__getitem__)
            return bool(busiest)

        self.server.wait_for(is_busy, timeout_s=30, what="be busy")
        return busiest[-1]

    def failovers(self, model: str) -> float:
        _, text = self.server.get("/metrics")
        line = f'tramontane:num_failovers_total{{model_name="{model}"}} '
        return float(next(li for li in text.splitlines() if li.startswith(line)).removeprefix(line))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("several")
    key, secret = new_key("alice", limits=Limits(models=("small",)))
    add_key(folder / "keys.json", key)
    adapter = write_adapter(folder / "sql", load_model_config(DEMO_MODEL), strength=0.05)
    file = folder / "cluster.yaml"
    file.write_text(f"""
api-keys: {folder / "keys.json"}
data-dir: {folder / "data"}
scale-down-after: 5
deployments:
  - name: main
    model: {DEMO_MODEL}
    dtype: bfloat16
    replicas: 2
  - name: small
    model: {DEMO_MODEL}
    served-model-name: small
    dtype: float32
    max-model-len: 256
    replicas: 0:1
    lora: {{sql: {adapter}}}
""")
    server = Server("--config", str(file))
    try:
        texts = {model: server.complete(model=model, **BODY)["choices"][0]["text"] for model in (*MODELS, "sql")}
        yield World(server, secret, texts)
    finally:
        server.kill()


class Load(threading.Thread):
    """Asks one model again and again, in streams. `wrong` has every answer that is not the expected one."""

    def __init__(self, world: World, model: str) -> None:
        super().__init__(daemon=True)
        self._world, self._model = world, model
        self.num_answers = 0
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                events = self._world.server.stream(model=self._model, **BODY)
                text = "".join(choice["text"] for event in events for choice in event["choices"])
            except Exception as e:  # the test reports it
                text = repr(e)
            self.num_answers += 1
            if text != self._world.texts[self._model]:
                self.wrong.append(text)

    def end(self) -> None:
        self.stop.set()
        self.join(60)


@contextlib.contextmanager
def loads_of(world: World, *models: str) -> Iterator[list[Load]]:
    """They end with the block, also when the test fails: the next one needs a model that nobody asks."""
    loads = [Load(world, model) for model in models]
    try:
        yield loads
    finally:
        for load in loads:
            load.stop.set()
        for load in loads:
            load.end()


@pytest.mark.timeout(300)
def test_a_killed_replica_of_one_model_disturbs_no_stream_of_either(world):
    assert len(set(world.texts.values())) == 3, "the models and the adapter write the same, so this shows nothing"
    before = {model: world.failovers(model) for model in MODELS}
    server = world.server
    # So many that a replica of the first always has some.
    with loads_of(world, *4 * (MODELS[0],), *2 * (MODELS[1],)) as loads:
        server.wait_for(lambda: all(load.num_answers for load in loads), timeout_s=60, what="answer")
        ranks = {name: server.rank(name, 0) for name in world.of("main")}
        ranks[world.wait_busy("main")].kill()
        server.wait_for(
            lambda: world.failovers("demo_model") > before["demo_model"], timeout_s=30, what="move a stream"
        )
        numbers = [load.num_answers for load in loads]
        server.wait_for(lambda: len(world.of("main")) == 2, timeout_s=90, what="replace the replica")
        server.wait_for(
            lambda: all(load.num_answers > number for load, number in zip(loads, numbers, strict=True)),
            timeout_s=60,
            what="go on",
        )
    assert [load.wrong for load in loads] == [[]] * 6
    assert world.failovers("small") == before["small"], "a stream of the other model was moved"


@pytest.mark.timeout(300)
def test_one_model_sleeps_and_is_woken_while_the_other_serves(world):
    server = world.server
    with loads_of(world, "demo_model") as (load,):
        server.wait_for(lambda: not world.of("small", None), timeout_s=60, what="scale to zero")
        status, health = server.health()
        assert (status, health["status"]) == (200, "ok"), health
        assert [m["ready"] for m in health["models"]] == [True, True]
        assert server.complete(model="small", **BODY)["choices"][0]["text"] == world.texts["small"]
        assert list(world.of("small")) == ["small-r0"] and len(world.of("main")) == 2
        assert server.complete(model="sql", **BODY)["choices"][0]["text"] == world.texts["sql"]
    assert (load.wrong, load.num_answers > 0) == ([], True)


@pytest.mark.timeout(300)
def test_keys_models_and_operators(world):
    restricted = world.client(world.secret)
    assert restricted.completions.create(model="small", **_openai(BODY)).choices[0].text == world.texts["small"]
    with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'demo_model'"):
        restricted.completions.create(model="demo_model", **_openai(BODY))
    assert [model.id for model in restricted.models.list().data] == ["small"]
    client = world.client()
    assert [model.id for model in client.models.list().data] == ["demo_model", "small", "sql"]
    with pytest.raises(openai.NotFoundError, match="Use 'demo_model' or 'small' or 'sql'"):
        client.completions.create(model="other", prompt="a")
    response = client.responses.create(model="small", input="def fibonacci(n):", max_output_tokens=16)
    assert client.responses.retrieve(response.id).output_text == response.output_text
    status, answer = world.server.post("/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/nowhere"})
    assert status in (400, 404) and "base_model_name" not in answer, "the only model with adapters is meant"
    view = json.loads(world.server.get("/admin/cluster")[1])
    assert [(d["name"], d["spec"]["max_replicas"]) for d in view["deployments"]] == [("main", 2), ("small", 1)]


@pytest.mark.timeout(300)
def test_the_lines_of_one_batch_wake_the_model_they_name(world, tmp_path: Path):
    world.server.wait_for(lambda: not world.of("small", None), timeout_s=60, what="scale to zero")
    names = [MODELS[i % 2] for i in range(20)]
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for i, name in enumerate(names):
            body = {"model": name, **BODY}
            line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    client = world.client()
    batch = client.batches.create(
        input_file_id=client.files.create(file=source.open("rb"), purpose="batch").id,
        endpoint="/v1/completions",
        completion_window="24h",
    )
    deadline = time.monotonic() + 90
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired"):
        assert time.monotonic() < deadline, (batch, world.server.output)
        time.sleep(0.1)
    lines = client.files.content(batch.output_file_id).text.splitlines()
    texts = {d["custom_id"]: d["response"]["body"]["choices"][0]["text"] for d in map(json.loads, lines)}
    assert texts == {str(i): world.texts[name] for i, name in enumerate(names)}


@pytest.mark.timeout(300)
def test_a_killed_controller_disturbs_nobody_and_comes_back(world):
    server = world.server
    before = {name: r["incarnation"] for name, r in world.of("main").items()}
    with loads_of(world, *MODELS) as loads:
        processes = [p for p in server.all_descendants() if _is_controller(p)]
        assert len(processes) == 2, "each deployment has its own"
        for process in processes:
            process.kill()
        server.wait_for(lambda: all(load.num_answers > 3 for load in loads), timeout_s=60, what="go on")
        server.wait_for(
            lambda: len([p for p in server.all_descendants() if _is_controller(p)]) == 2,
            timeout_s=60,
            what="restart the controllers",
        )
    assert [load.wrong for load in loads] == [[], []]
    server.wait_for(lambda: len(world.of("main")) == 2, timeout_s=60, what="find its replicas again")
    assert {name: r["incarnation"] for name, r in world.of("main").items()} == before


def _is_controller(process: psutil.Process) -> bool:
    try:
        return "ControllerActor" in " ".join(process.cmdline()[:1])
    except psutil.Error:
        return False


def _openai(body: dict) -> dict:
    """The client has no argument `ignore_eos`."""
    known = {name: value for name, value in body.items() if name != "ignore_eos"}
    return {**known, "extra_body": {"ignore_eos": True}}
