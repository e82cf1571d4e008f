"""Invalid bodies, sent to the real listener over a real engine: wrong types and broken text in every field of every schema, deep nesting,
megabytes.

Good requests in between must be served, and every error must have the error format and no 5xx status. The fixture `attacker` has the
checks at the end. Seeded. `make test` sends a sample of the mutations and of the largest bodies, `make test-fuzz` all mutations, `make
test-attack` all large bodies.
"""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.clients.attacker import MIB, Attacker
from support.clients.fuzz_bodies import FULL, mutated_bodies, other_bodies
from support.clients.raw_http import request
from support.servers.live_listener import KEY

SEED = 7
MAX_WAIT_S = 2.8
DEEP = [10, 63, 64, 100, 1000, 100_000]


def send_all(attacker: Attacker, bodies: list[tuple[str, bytes]]) -> dict[int, int]:
    """Counts responses by status. Sends a good request after every 50 bodies."""
    statuses: dict[int, int] = {}
    with ThreadPoolExecutor(4) as threads:
        for start in range(0, len(bodies), 50):
            batch = bodies[start : start + 50]
            for answer in threads.map(lambda item: attacker.post(*item), batch):
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            attacker.check_alive()
    return statuses


def test_the_bodies_have_every_field(attacker):
    """A new field or endpoint in the document must be added to the bodies above."""
    (answer,) = attacker.attack(request("/openapi.json", method="GET", key=KEY, content_type=None))
    document = json.loads(answer.body)
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content")
        # Azure's paths take the bodies of the others.
        if content is not None and "application/json" in content and not path.startswith("/openai/"):
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            # The others are known, but never act.
            acting = {
                field
                for field, schema in schemas[name]["properties"].items()
                if "type" in schema or "$ref" in schema or "anyOf" in schema
            }
            assert acting <= set(FULL[path]), f"{path}: fields that no fuzzer sends"


def test_a_sample_of_mutated_bodies(attacker):
    rng = random.Random(SEED)
    every = list(mutated_bodies())
    assert len(every) > 5000
    statuses = send_all(attacker, [*rng.sample(every, 250), *other_bodies(rng, 150)])
    assert statuses.get(200) and statuses.get(400), statuses


@pytest.mark.fuzz
@pytest.mark.timeout(1200)
def test_all_mutated_bodies(attacker):
    rng = random.Random(SEED + 1)
    statuses = send_all(attacker, [*mutated_bodies(), *other_bodies(rng, 3000)])
    print(statuses)
    assert sum(statuses.values()) > 8000


NESTINGS = [
    # (name, opening, inside, closing) around a body
    ("lists", b"[", b"", b"]"),
    ("objects", b'{"a":', b"1", b"}"),
    ("both", b'[{"a":', b"1", b"}]"),
    ("unclosed", b"[", b"", b""),
]


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize(("name", "opening", "inside", "closing"), NESTINGS, ids=[n[0] for n in NESTINGS])
def test_deep_nesting(attacker, depth, name, opening, inside, closing):
    deep = opening * depth + inside + closing * depth
    chat = b'{"model":"demo_model","max_tokens":1,"messages":[{"role":"user","content":"x"}],'
    for path, body in [
        ("/v1/completions", deep),
        ("/v1/completions", b'{"model":"demo_model","max_tokens":1,"prompt":' + deep + b"}"),
        (
            "/v1/completions",
            b'{"model":"demo_model","max_tokens":1,"prompt":"x","structured_outputs":{"json":' + deep + b"}}",
        ),
        (
            "/v1/chat/completions",
            chat + b'"tools":[{"type":"function","function":{"name":"f","parameters":' + deep + b"}}]}",
        ),
        ("/tokenize", b'{"prompt":"x","messages":' + deep + b"}"),
    ]:
        answer = attacker.post(path, body)
        assert answer.status in (200, 400), (path, answer)
        assert answer.status == 400 or depth < 64, "limits of depth"
    attacker.check_alive()


def with_text(before: bytes, text: bytes, after: bytes, *, num_bytes: int) -> bytes:
    return before + b'"' + text * (num_bytes // len(text)) + b'"' + after


UNITS = (b"a b ", b"\xf0\x9f\xa4\x96")
UNITS_TOO = (b"a", b"\\ud800", b"\\n", b"</s>")


@pytest.mark.parametrize(
    "unit", [*UNITS, *(pytest.param(unit, marks=pytest.mark.attack) for unit in UNITS_TOO)], ids=repr
)
def test_megabytes_of_text(attacker, unit):
    """Just below and just above the size limit, in every text field; no response repeats the text."""
    for num_bytes, statuses in ((7 * MIB, (200, 400, 404)), (10 * MIB, (413,))):
        for path, before, after in [
            ("/v1/completions", b'{"model":"demo_model","max_tokens":1,"prompt":', b"}"),
            ("/v1/chat/completions", b'{"model":"demo_model","messages":[{"role":"user","content":', b"}]}"),
            ("/v1/completions", b'{"model":"demo_model","prompt":"x","stop":', b"}"),
            ("/v1/completions", b'{"prompt":"x","model":', b"}"),
            ("/v1/completions", b'{"model":"demo_model","prompt":"x","structured_outputs":{"regex":', b"}}"),
            ("/v1/embeddings", b'{"model":"demo_model","input":', b"}"),
        ]:
            answer = attacker.post(path, with_text(before, unit, after, num_bytes=num_bytes))
            assert answer.status in statuses, (path, before, answer)
            assert path != "/v1/chat/completions" or unit * 9 not in answer.body, "errors must not repeat prompts"
    attacker.check_alive()


COMPLETION = b'{"model":"demo_model","max_tokens":1,"prompt":'
CHAT = b'{"model":"demo_model","max_tokens":1,"messages":'
MESSAGE = b'{"role":"user","content":"a"}'
# Bodies of some megabytes with as many small values as possible: the most expensive ones to parse.
BIG: dict[str, tuple[str, Callable[[], bytes]]] = {
    "lists in a list": ("/v1/completions", lambda: COMPLETION + b"[" + b"[]," * 2_500_000 + b"[1]]}"),
    "unknown fields": (
        "/v1/completions",
        lambda: COMPLETION + b'"x"' + b"".join(b',"k%d":1' % i for i in range(600_000)) + b"}",
    ),
    "messages": ("/v1/chat/completions", lambda: CHAT + b"[" + (MESSAGE + b",") * 200_000 + MESSAGE + b"]}"),
    "tokens": ("/detokenize", lambda: b'{"tokens":[' + b"5," * 900_000 + b"5]}"),
}
BIG_TOO: dict[str, tuple[str, Callable[[], bytes]]] = {
    "token ids": ("/v1/completions", lambda: COMPLETION + b"[" + b"1," * 3_900_000 + b"1]}"),
    "prompts": ("/v1/completions", lambda: COMPLETION + b"[" + b'"a",' * 1_900_000 + b'"a"]}'),
    "biases": (
        "/v1/completions",
        lambda: COMPLETION + b'"x","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(600_000)) + b"}}",
    ),
    "inputs": ("/v1/embeddings", lambda: b'{"model":"demo_model","input":[' + b'"a",' * 1_900_000 + b'"a"]}'),
    "moderations": ("/v1/moderations", lambda: b'{"input":[' + b'"a",' * 2000 + b'"a"]}'),
    "properties": (
        "/v1/completions",
        lambda: (
            COMPLETION
            + b'"x","structured_outputs":{"json":{"properties":{'
            + b",".join(b'"k%d":{}' % i for i in range(300_000))
            + b"}}}}"
        ),
    ),
}


@pytest.mark.parametrize("name", [*BIG, *(pytest.param(name, marks=pytest.mark.attack) for name in BIG_TOO)])
def test_big_bodies_do_not_delay_other_requests(attacker, name):
    """A replica is considered lost if its gateway is silent for three seconds; the fixture would find that in the log."""
    path, make_body = (BIG | BIG_TOO)[name]
    body = make_body()
    probe = request("/health/live", method="GET", key=None, content_type=None)
    worst_s = 0.0
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(attacker.post, path, body)
        while not future.done():
            started = time.monotonic()
            assert attacker.attack(probe, method="GET")[0].status == 200
            worst_s = max(worst_s, time.monotonic() - started)
            time.sleep(0.02)
        answer = future.result()
    assert answer.status in (200, 400), answer
    assert worst_s < MAX_WAIT_S, f"other requests waited {worst_s:.1f} s"
