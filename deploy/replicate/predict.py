"""Replicate's predictor: starts `tramontane serve` next to it, and passes each prediction on as a stream of text.

Knows Cog's interface and the server's HTTP API; the server listens on the loopback address, so there is no key. MODEL in the environment
is a Hub id, a folder or the address of a bucket; without it, a folder `weights` next to this file, or the demo model.
"""

import asyncio
import json
import os
import socket
from pathlib import Path

import httpx
from cog import AsyncConcatenateIterator, BasePredictor, Input

START_TIMEOUT_S = 1800.0  # a download of 15 GB, and the first forward pass


class Predictor(BasePredictor):
    async def setup(self) -> None:
        """Returns once a request would be served. Raises RuntimeError if the server ends, whose message is in the log."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        weights = Path(__file__).with_name("weights")
        model = os.environ.get("MODEL") or (str(weights) if weights.is_dir() else "")
        command = ["tramontane", "serve", *([model] if model else []), "--port", str(port), "--no-batches"]
        command += os.environ.get("SERVE_OPTIONS", "").split()
        # "none": Replicate's container is not one of the platforms that call the server themselves.
        self.server = await asyncio.create_subprocess_exec(*command, env=os.environ | {"TRAMONTANE_PLATFORM": "none"})
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=httpx.Timeout(600.0, connect=5.0))
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await self._is_ready():
                if self.server.returncode is not None:
                    raise RuntimeError(f"tramontane serve ended with {self.server.returncode}; its message is above.")
                await asyncio.sleep(0.5)

    async def _is_ready(self) -> bool:
        try:
            return (await self.client.get("/ping")).status_code == 200
        except httpx.TransportError:
            return False

    async def predict(
        self,
        prompt: str = Input(description="What the user says; with raw, the text to continue."),
        system_prompt: str = Input(description="What comes before it, for a chat model.", default=""),
        max_tokens: int = Input(description="The most tokens to generate.", default=512, ge=1),
        temperature: float = Input(description="0 always takes the most likely token.", default=0.7, ge=0, le=2),
        top_p: float = Input(
            description="Only the most likely tokens up to this probability.", default=1.0, ge=0.01, le=1
        ),
        seed: int = Input(description="The same seed gives the same text; -1 is a random one.", default=-1),
        raw: bool = Input(description="Continue the prompt instead of answering it.", default=False),
    ) -> AsyncConcatenateIterator[str]:
        body = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stream": True}
        body |= {} if seed < 0 else {"seed": seed}
        if raw:
            body["prompt"] = prompt
        else:
            system = [{"role": "system", "content": system_prompt}] if system_prompt else []
            body["messages"] = [*system, {"role": "user", "content": prompt}]
        async with self.client.stream("POST", "/invocations", json=body) as response:
            if response.status_code != 200:
                raise ValueError(json.loads(await response.aread())["error"]["message"])
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    text = choice.get("text") or choice.get("delta", {}).get("content")
                    if text:
                        yield text
