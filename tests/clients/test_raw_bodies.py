"""Bodies that no client would send, to the real listener over a real engine: other types and broken text in every field of every
schema, nesting, megabytes.

Good requests are served in between; every answer is an envelope and none a 5xx; see the fixture `attacker` for what is checked at the
end. Seeded. The long form (`make test-fuzz`) sends all mutations, the short one a sample.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from attacker import MIB, Attacker
from fuzz_bodies import FULL, mutated_bodies, other_bodies
from live_listener import KEY
from raw_http import request

SEED = 7
DEEP = [10, 63, 64, 100, 1000, 100_000]


def send_all(attacker: Attacker, bodies: list[tuple[str, bytes]]) -> dict[int, int]:
    """How many answers had which status. A good request after every fiftieth."""
    statuses: dict[int, int] = {}
    with ThreadPoolExecutor(4) as threads:
        for start in range(0, len(bodies), 50):
            batch = bodies[start : start + 50]
            for answer in threads.map(lambda item: attacker.post(*item), batch):
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            attacker.check_alive()
    return statuses


def test_every_field_of_every_body_is_attacked(attacker):
    """A new field or endpoint in the document must come into the bodies above."""
    (answer,) = attacker.attack(request("/openapi.json", method="GET", key=KEY, content_type=None))
    document = json.loads(answer.body)
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content")
        if content is not None:
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert set(schemas[name]["properties"]) <= set(FULL[path]), f"{path}: fields that no fuzzer sends"


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


def long_text(num_bytes: int, unit: bytes) -> bytes:
    return unit * (num_bytes // len(unit))


@pytest.mark.parametrize("unit", [b"a", b"a b ", b"\xf0\x9f\xa4\x96", b"\\ud800", b"\\n", b"</s>"], ids=repr)
def test_megabytes_of_text(attacker, unit):
    """Just below and just above what a body may have, wherever a text may stand."""
    for size, statuses in ((7 * MIB, (200, 400)), (10 * MIB, (413,))):
        text = b'"' + long_text(size, unit) + b'"'
        for path, before, after in [
            ("/v1/completions", b'{"model":"demo_model","max_tokens":1,"prompt":', b"}"),
            ("/v1/completions", b'{"model":"demo_model","max_tokens":1,"truncate_prompt_tokens":9,"prompt":', b"}"),
            ("/v1/chat/completions", b'{"model":"demo_model","messages":[{"role":"user","content":', b"}]}"),
            ("/v1/completions", b'{"model":"demo_model","prompt":"x","stop":', b"}"),
            ("/v1/completions", b'{"prompt":"x","model":', b"}"),
            ("/v1/completions", b'{"model":"demo_model","prompt":"x","structured_outputs":{"regex":', b"}}"),
            ("/v1/embeddings", b'{"model":"demo_model","input":', b"}"),
        ]:
            answer = attacker.post(path, before + text + after)
            assert answer.status in statuses, (path, before, answer)
    attacker.check_alive()
