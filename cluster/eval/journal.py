"""The answers of an evaluation, one JSON line each, kept as they come: whatever ends the command, the next one goes on from there.

A line that was cut off by a crash is dropped. An answer counts only for the request that it answered: a changed question, model or option
is asked again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from workers.errors import ConfigError


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """key: of the request, see `request_key`. error: why there is none. seconds: from the request to the end of the answer.

    score: of an answer that is neither right nor wrong. logprob, is_greedy: of a request for these alone, see `model.Scored`.
    """

    key: str
    model: str
    item: str
    text: str = ""
    passed: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    score: float | None = None
    logprob: float | None = None
    is_greedy: bool = False


def request_key(*parts: Any) -> str:
    """Changes with anything that may change the answer or its check."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class Journal:
    """Close it, or use it in a `with` statement. Raises ConfigError where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
            self.answers = {answer.key: answer for answer in self._read()}
        except OSError as e:
            raise ConfigError(
                f"{path} cannot be used: {e.strerror}.", remedy="Give another folder with --output.", param="--output"
            ) from e

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """On the disk when this returns."""
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers[answer.key] = answer

    def _read(self) -> Iterator[Answer]:
        """Errors are left out: they are asked again."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                break
            end += len(line)
            try:
                answer = msgspec.json.decode(line, type=Answer)
            except msgspec.DecodeError as e:
                raise ConfigError(
                    f"{self.path} is not a file of this command: {e}.",
                    remedy="Give another folder with --output.",
                    param="--output",
                ) from e
            if answer.error is None:
                yield answer
