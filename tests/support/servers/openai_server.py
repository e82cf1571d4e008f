"""A small OpenAI-compatible server in a thread, which takes or refuses what a test wants, and fails when and how a test wants."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from cluster.bench.prompts import WORDS


@dataclass
class OpenAIServer:
    """refuses: fields of a body that get 400. fail: takes the number of a load's request and says what happens to it: a status, "break"
    for a stream that breaks after two tokens, "end" for one that ends there, "error" for an error event. Bodies are in `bodies`.
    """

    model: str = "tiny"
    refuses: tuple[str, ...] = ()
    takes_ids: bool = True
    has_tokenize: bool = True
    has_models: bool = True
    sends_usage: bool = True
    key: str | None = None
    tokens_per_word: int = 2
    num_extra: int = 0
    fail: Callable[[int], int | str | None] = lambda _: None
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_loaded: int = 0
    token_s: float = 0.0

    def __enter__(self) -> "OpenAIServer":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = web.AppRunner(self._app(), shutdown_timeout=0)
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        if self.has_tokenize:
            app.router.add_post("/tokenize", self._tokenize)
        if self.has_models:
            app.router.add_get("/v1/models", self._models)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        if refused := self._refusal(request):
            return refused
        return web.json_response({"data": [{"id": self.model}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        words = (await request.json())["prompt"].split()
        return web.json_response({"tokens": [1000 + WORDS.index(word) for word in words]})

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "a key is needed")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        if refused := self._refusal(request):
            return refused
        body = await request.json()
        self.bodies.append(body)
        if any(name in body for name in self.refuses) or (isinstance(body.get("prompt"), list) and not self.takes_ids):
            return _error(400, "unknown field")
        fate = None
        if body["max_tokens"] > 1:
            fate, self.num_loaded = self.fail(self.num_loaded), self.num_loaded + 1
        if isinstance(fate, int):
            return _error(fate, f"status {fate}", self.headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = request.path.endswith("chat/completions")
        if is_chat:
            await _send(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        num = body["max_tokens"]
        for i in range(num):
            if fate == "error" and i == 2:
                await _send(response, {"error": {"message": "out of memory"}})
                return response
            if fate == "end" and i == 2:
                return response
            if fate == "break" and i == 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            reason = "length" if i == num - 1 else None
            piece = {"delta": {"content": " x"}} if is_chat else {"text": " x"}
            await _send(response, {"choices": [{"index": 0, "finish_reason": reason, **piece}]})
            await asyncio.sleep(self.token_s)
        if self.sends_usage and body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": self._num_prompt(body), "completion_tokens": num}
            await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _num_prompt(self, body: dict[str, Any]) -> int:
        prompt = body.get("prompt") or body["messages"][0]["content"]
        return len(prompt) if isinstance(prompt, list) else self.num_extra + self.tokens_per_word * len(prompt.split())


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)
