"""The events of a streamed answer: from pieces of bytes to what each event says. Knows the event stream's form and OpenAI's chunks."""

from dataclasses import dataclass

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Event:
    """has_tokens: it brings a part of the answer. error: the message of an event that says what went wrong."""

    has_tokens: bool
    is_last_choice: bool
    usage: Usage | None
    error: str | None


DONE = b"[DONE]"
_decoder = msgspec.json.Decoder(_Chunk)


class Splitter:
    """Cuts a body into the data of its events; keeps what is not whole yet."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that ended in this piece; comments and other fields are skipped."""
        text = self._rest + data
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *whole, self._rest = text.split(b"\n\n")
        found = []
        for event in whole:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found


def read_event(data: bytes) -> Event:
    """One event other than [DONE]. Raises msgspec.DecodeError for what is not such a chunk.

    A chunk with a choice brings tokens, even with an empty text: half a character is held back, and its token was made all the same. Two
    kinds do not: the opening of a chat answer, which only has a role, and a closing one, which only says why the answer ended.
    """
    chunk = _decoder.decode(data)
    choice = chunk.choices[0] if chunk.choices else None
    error = None if bytes(chunk.error) == b"null" else error_message(data)
    if choice is None:
        return Event(False, False, chunk.usage, error)
    if choice.delta is not None:
        delta = choice.delta
        has_text = bool(
            delta.content or delta.reasoning or delta.reasoning_content or bytes(delta.tool_calls) != b"null"
        )
    else:
        has_text = bool(choice.text) or choice.finish_reason is None
    return Event(has_text, choice.finish_reason is not None, chunk.usage, error)


def error_message(data: bytes) -> str:
    """The message of an error in OpenAI's form; otherwise the beginning of the data."""
    try:
        error = msgspec.json.decode(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        return data[:200].decode(errors="replace").strip()
