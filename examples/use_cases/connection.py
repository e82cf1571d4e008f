"""Where the examples find the server and the model: OPENAI_BASE_URL, OPENAI_API_KEY and MODEL, as other programs do, and --model before
MODEL. Knows no example.
"""

import argparse
import os
import sys

from openai import APIConnectionError, OpenAI


def _options() -> tuple[argparse.Namespace, list[str]]:
    about = getattr(sys.modules["__main__"], "__doc__", None)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="default: MODEL, or the server's first")
    return parser.parse_known_args()


def words() -> list[str]:
    """The arguments of the command without --model and its value."""
    return _options()[1]


def connect() -> tuple[OpenAI, str]:
    """A client and the name of a model, which may be an adapter: --model, MODEL, or the first that the server lists."""
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    return client, _options()[0].model or first_model(client)


def first_model(client: OpenAI) -> str:
    """The server's base model, beside which it may list adapters."""
    try:
        return next(iter(client.models.list())).id
    except APIConnectionError as e:
        raise SystemExit(f"Nothing answers at {client.base_url}. Start `make serve`, or set OPENAI_BASE_URL.") from e


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
