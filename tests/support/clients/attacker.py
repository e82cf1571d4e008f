"""Sends invalid requests to a fuzz target and checks the responses. Knows raw HTTP and one good request, not what the tests send."""

import json
import time
from typing import Any

from support.clients.fuzz_bodies import PLAIN
from support.clients.raw_http import Answer, parse, request, send
from support.servers.live_listener import KEY, FuzzTarget

MIB = 1024 * 1024
GOOD = json.dumps(PLAIN["/v1/completions"]).encode()
GOOD_REQUEST = request("/v1/completions", GOOD, key=KEY)


class Attacker:
    """Sends to a target, checks the responses, and that a good request is served afterwards."""

    def __init__(self, target: FuzzTarget) -> None:
        self.target = target

    def attack(self, data: bytes | list[bytes], *, method: str = "POST", **options: Any) -> list[Answer]:
        answers = parse(send(self.target.port, data, **options), method=method)
        for answer in answers:
            answer.check()
        return answers

    def post(self, path: str, body: bytes, **options: Any) -> Answer:
        answers = self.attack(request(path, body, key=KEY, **options))
        assert len(answers) == 1, f"no complete response to {body[:300]!r}"
        return answers[0]

    def check_alive(self) -> None:
        assert self.target.is_alive, self.target.log[-5000:]
        started = time.monotonic()
        answer = self.post("/v1/completions", GOOD)
        assert answer.status == 200, answer
        assert time.monotonic() - started < 10
