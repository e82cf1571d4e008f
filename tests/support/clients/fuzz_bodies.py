"""Bodies for fuzzers: for each endpoint a valid one and one with every field, and mutations with parts replaced, removed, doubled, cut
and flipped. Knows the fields; a test compares them with /openapi.json. Sends nothing.
"""

import json
import random
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

from support.servers.live_listener import MODEL

HEAD = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
TOOL = {"type": "function", "function": {**HEAD, "description": "d", "strict": True}}
CALL = {"id": "call_123456789", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, "index": 0}
GENERATION: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 1,
    "n": 1,
    "stream": False,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "stop": ["a"],
    "temperature": 0.5,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"5": 1.0},
    "seed": 1,
    "random_seed": 1,
    "user": "u",
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "description": "d", "strict": True, "schema": {"type": "object"}},
    },
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 0,
    "stop_token_ids": [5],
    "ignore_eos": False,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "bad_words": ["b"],
    "allowed_token_ids": [5, 6],
    "truncate_prompt_tokens": 4,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "structured_outputs": {
        "json": {"type": "object"},
        "regex": "a+",
        "choice": ["a"],
        "grammar": 'start: "a"',
        "json_object": False,
    },
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": 'start: "a"',
    "priority": 0,
}
# By endpoint: a valid body, and one with every field, which may contradict each other.
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/embeddings": {"model": MODEL, "input": "x"},
    "/v1/moderations": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/admin/replicas/{replica_id}/drain": {},
}
FULL: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        **GENERATION,
        "prompt": [[1, 5], [1, 6]],
        "suffix": "s",
        "echo": True,
        "logprobs": 1,
        "best_of": 1,
        "add_special_tokens": True,
        "metadata": {},
        "use_beam_search": False,
    },
    "/v1/chat/completions": {
        **GENERATION,
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "x"}, {"type": "input_text", "text": "y"}, "z"],
                "name": "Ann",
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "call_123456789", "content": "21", "name": "f"},
            {"role": "assistant", "content": "so", "prefix": True},
        ],
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 1,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": True,
        "safe_prompt": True,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "modalities": ["text"],
    },
    "/v1/embeddings": {
        "model": MODEL,
        "input": ["x", "y"],
        "encoding_format": "base64",
        "dimensions": 256,
        "output_dimension": 256,
        "output_dtype": "float",
        "user": "u",
        "truncate_prompt_tokens": 4,
        "priority": 0,
    },
    "/v1/moderations": {"model": MODEL, "input": ["x", "y"]},
    "/v1/responses": {
        "model": MODEL,
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "abc123def", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "abc123def", "output": "y"},
        ],
        "instructions": "s",
        "previous_response_id": None,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
        "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": True,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "reasoning": {"effort": "none"},
        "truncation": "auto",
        "stream": False,
        "stream_options": None,
        "store": False,
        "background": False,
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
        "max_output_tokens": 2,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_logprobs": 1,
        "user": "u",
        "seed": 1,
        "stop": ["q"],
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "min_tokens": 0,
        "ignore_eos": False,
        "priority": 0,
    },
    "/v1/responses/input_tokens": {
        "model": MODEL,
        "input": "x",
        "instructions": "s",
        "previous_response_id": None,
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"verbosity": "low"},
        "reasoning": {"effort": "none"},
        "truncation": "disabled",
    },
    "/v1/messages": {
        "model": MODEL,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "abc123def", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "abc123def", "content": "y"}]},
        ],
        "system": "s",
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "thread": None,
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        "max_tokens": 2,
        "stream": False,
        "stop_sequences": ["q"],
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 5,
        "metadata": {"user_id": "u"},
        "seed": 1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": False,
        "priority": 0,
    },
    "/v1/messages/count_tokens": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "system": [{"type": "text", "text": "s"}],
        "tools": [],
        "tool_choice": {"type": "none"},
        "thinking": {"type": "disabled"},
        "thread": None,
        "output_config": {},
    },
    "/v1/score": {
        "model": MODEL,
        "text_1": "x",
        "text_2": ["y", "z"],
        "scoring": "logprob",
        "truncate_prompt_tokens": 4,
        "priority": 0,
        "user": "u",
    },
    "/v1/rerank": {
        "model": MODEL,
        "query": "x",
        "documents": ["y", {"text": "z"}],
        "top_n": 1,
        "return_documents": True,
        "scoring": "similarity",
        "truncate_prompt_tokens": 4,
        "priority": 0,
        "user": "u",
    },
    "/v1/fim/completions": {
        "model": MODEL,
        "prompt": "x",
        "suffix": "y",
        "max_tokens": 2,
        "stream": False,
        "stream_options": None,
        "stop": ["q"],
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 1,
        "random_seed": 1,
        "min_tokens": 0,
        "ignore_eos": False,
        "priority": 0,
        "user": "u",
    },
    "/tokenize": {
        "model": MODEL,
        "prompt": "x",
        "messages": [{"role": "developer", "content": "x"}],
        "tools": [TOOL],
        "add_special_tokens": True,
        "return_token_strs": True,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "chat_template_kwargs": {},
    },
    "/detokenize": {"tokens": [5, 6], "model": MODEL},
    "/v1/batches": {
        "input_file_id": "file-x",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    },
    "/admin/replicas/{replica_id}/drain": {"grace_s": 1.0},
    "/v1/load_lora_adapter": {
        "lora_name": "x",
        "lora_path": "/no/such/folder",
        "load_inplace": False,
        "canary": "10%",
        "base_model_name": "m",
    },
    "/v1/unload_lora_adapter": {"lora_name": "x"},
}
# Fragments that replace a value: other types, numbers out of range, invalid text, and invalid JSON.
FRAGMENTS = [
    *(
        b"null",
        b"true",
        b"false",
        b"0",
        b"-0",
        b"1",
        b"-1",
        b"1.5",
        b"-1e-9",
        b"64",
        b"2147483648",
        b"9223372036854775808",
    ),
    *(b"1e308", b"1e400", b"-1e400", b"1e-400", b"-9223372036854775809", b"9" * 400, b"9" * 6000, b"0." + b"1" * 6000),
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"01",
        b".5",
        b"+1",
        b"0x10",
        b"1e",
        b"--1",
        b"tru",
        b"undefined",
        b"'x'",
        b"",
        b",",
    ),
    *(
        b'""',
        b'"x"',
        b'" "',
        b'"\\u0000"',
        b'"\\ud800"',
        b'"\\udfff\\ud800"',
        b'"\xed\xa0\x80"',
        b'"\xff\xfe"',
        b'"\xc0\xaf"',
    ),
    *(b'"\\x"', b'"\\u12"', b'"\n"', b'"', b'"\xf0\x9f\xa4\x96"', b'"\\ud83e\\udd16"', b'"' + b"a" * 70_000 + b'"'),
    *(
        b"[]",
        b"{}",
        b"[null]",
        b"[{}]",
        b'["x"]',
        b'[1,"x",[2]]',
        b"[1,]",
        b"[-1]",
        b"[1e400]",
        b'["\\ud800"]',
        b"[[]]",
        b"[true]",
    ),
    *(
        b'{"a":1}',
        b'{"type":"text"}',
        b'{"type":"function"}',
        b'{"$ref":"#"}',
        b'{"a":1,"a":2}',
        b'{"":""}',
        b"{1:2}",
        b"[" * 40,
    ),
    *(b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70, b"[" * 20_000 + b"]" * 20_000),
    *(
        b'{"pattern":"(a+)+$"}',
        b'{"anyOf":[]}',
        b'{"$ref":"http://127.0.0.1:1/x"}',
        b'"(((((a*)*)*)*)*)*b"',
        b'"start: start"',
    ),
]
_MARK = "@@here@@"


def mutated_bodies() -> Iterator[tuple[str, bytes]]:
    """(path, body): every node of every full body and every field of every plain one, replaced by every fragment."""
    for path, full in FULL.items():
        bodies = [*_replaced(full), *({**PLAIN.get(path, full), field: _MARK} for field in full)]
        for body in bodies:
            before, after = json.dumps(body).split(f'"{_MARK}"')
            for fragment in FRAGMENTS:
                yield path, before.encode() + fragment + after.encode()


def _replaced(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for i in range(len(list(_places(body)))):
        copy = deepcopy(body)
        container, key = list(_places(copy))[i]
        container[key] = _MARK
        yield copy


def other_bodies(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Full bodies with a field missing, unknown or twice, cut off, or with bytes flipped, moved and doubled."""
    for _ in range(count):
        path = rng.choice(list(FULL))
        body = deepcopy(rng.choice([FULL, PLAIN]).get(path, FULL[path]))
        places = list(_places(body))
        if places and rng.random() < 0.5:
            container, key = rng.choice(places)
            if isinstance(container, dict):
                match rng.randrange(3):
                    case 0:
                        del container[key]
                    case 1:
                        container[rng.choice(["extra", "", "\ud800", "__proto__", "x" * 5000])] = 1
                    case _:
                        container[key] = [container[key]]
        data = json.dumps(body).encode()
        for _ in range(rng.randrange(4)):
            at, length = rng.randrange(len(data) + 1), rng.randrange(1, 9)
            match rng.randrange(5):
                case 0:
                    data = data[:at]
                case 1:
                    data = data[:at] + rng.randbytes(length) + data[at:]
                case 2:
                    data = data[:at] + data[at + length :]
                case 3:
                    data = data[:at] + data[at : at + length] * rng.randrange(2, 50) + data[at + length :]
                case _:
                    data = data[:at] + rng.choice([b"}", b"{", b"]", b'"', b",", b":", b"\x00", b"\\"]) + data[at:]
        yield path, data


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    """(container, key) of every node in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key
        yield from _places(child)
