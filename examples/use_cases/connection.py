"""Where the examples find the server: OPENAI_BASE_URL, OPENAI_API_KEY and MODEL, as other programs do. Knows no example."""

import os

from openai import OpenAI


def connect() -> tuple[OpenAI, str]:
    """A client and the name of a model: MODEL, or the first that the server lists."""
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    return client, os.environ.get("MODEL") or next(iter(client.models.list())).id


def ask(question: str, *, system: str | None = None, max_tokens: int = 200, **more: object) -> str:
    """The answer to one question."""
    client, model = connect()
    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0.2, seed=1, **more
    )
    return answer.choices[0].message.content or ""
