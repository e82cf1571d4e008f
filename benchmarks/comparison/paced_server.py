"""A server of a known pace: streams made-up tokens at fixed times, and says when it really wrote them. Computes nothing.

    python benchmarks/comparison/paced_server.py --port 8000

POST /v1/completions streams `max_tokens` tokens: the first after 60 ms, then gaps of 15 ms, each sixth of 45 ms. GET /written answers with
the percentiles of what was written since the last such request, in ms, under the names that bench_agreement.py uses.
"""

import argparse
import asyncio
import itertools
import json
import time

import numpy as np
from aiohttp import web

FIRST_S, GAP_S, LONG_GAP_S, LONG_EVERY = 0.060, 0.015, 0.045, 6
PERCENTILES = (50, 90, 99)


class Pace:
    def __init__(self) -> None:
        self._written: list[tuple[float, list[float]]] = []  # when asked, and when each token was written

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = time.perf_counter()
        body = await request.json()
        num = int(body.get("max_tokens", 16))
        num_prompt = len(body["prompt"]) if isinstance(body["prompt"], list) else len(body["prompt"].split())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        due, times = asked + FIRST_S, []
        for i in range(num):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            choice = {"index": 0, "text": " a", "finish_reason": "length" if i == num - 1 else None}
            times.append(time.perf_counter())
            await response.write(_event({"choices": [choice]}))
            due += LONG_GAP_S if i % LONG_EVERY == LONG_EVERY - 1 else GAP_S
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num, "total_tokens": num_prompt + num}
        await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        self._written.append((asked, times))
        return response

    async def written(self, _: web.Request) -> web.Response:
        found, self._written = self._written, []
        values = {
            "ttft": [times[0] - asked for asked, times in found],
            "gap": [b - a for _, times in found for a, b in itertools.pairwise(times)],
            "mean_gap": [(times[-1] - times[0]) / (len(times) - 1) for _, times in found if len(times) > 1],
            "e2e": [times[-1] - asked for asked, times in found],
        }
        ends = [times[-1] for _, times in found]
        answer = {
            f"{name}_p{p}": float(np.percentile(v, p)) * 1e3 for name, v in values.items() if v for p in PERCENTILES
        }
        if found:
            duration = max(ends) - min(asked for asked, _ in found)
            answer["tokens_per_s"] = sum(len(times) for _, times in found) / duration
            answer["requests_per_s"] = len(found) / duration
        return web.json_response(answer)


def _event(chunk: dict) -> bytes:
    common = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "paced"}
    return b"data: " + json.dumps(common | chunk).encode() + b"\n\n"


async def _ok(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "paced", "object": "model"}]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    pace = Pace()
    app = web.Application()
    app.router.add_post("/v1/completions", pace.complete)
    app.router.add_get("/written", pace.written)
    app.router.add_get("/health", _ok)
    app.router.add_get("/v1/models", _models)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
