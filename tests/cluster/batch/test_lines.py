"""Invalid lines and their errors, what planning derives from valid ones, and limits on lines and files."""

import io
import json

import pytest
from support.batch.batches import ENDPOINT, SimulatedExecutor, request

from cluster.batch import lines
from cluster.batch.records import Line, parse_window
from cluster.batch.store.order import length_class, order
from workers.errors import RequestError


def scan(data: bytes, **options):
    check = lambda endpoint, body: SimulatedExecutor().check(endpoint, body, owner="")  # noqa: E731
    chunks = list(lines.scan(io.BytesIO(data), **{"endpoint": ENDPOINT, "check": check, **options}))
    return [x for c in chunks for x in c.lines], [e for c in chunks for e in c.errors]


GOOD = json.loads(request("a"))
WRONG = [
    ("{]", "invalid_json_line", None, "not parseable"),
    ("[1]", "invalid_json_line", None, "not a JSON object"),
    ('"text"', "invalid_json_line", None, "not a JSON object"),
    ('{"custom_id": "a"', "invalid_json_line", None, "not parseable"),
    (b'{"custom_id": "\xff"}', "invalid_json_line", None, "not parseable"),
    ({"custom_id": None}, "invalid_type", "custom_id", "expected a string"),
    ({"custom_id": 7}, "invalid_type", "custom_id", "expected a string"),
    ({"custom_id": ""}, "invalid_custom_id", "custom_id", "1 to 512"),
    ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id", "1 to 512"),
    ({"custom_id": "a\0"}, "invalid_custom_id", "custom_id", "NUL"),
    ({"custom_id": ...}, "missing_required_parameter", "custom_id", "'custom_id'"),
    ({"method": ...}, "missing_required_parameter", "method", "'method'"),
    ({"url": ...}, "missing_required_parameter", "url", "'url'"),
    ({"body": ...}, "missing_required_parameter", "body", "'body'"),
    ({"method": "GET"}, "invalid_method", "method", "'POST'"),
    ({"url": "/v1/chat/completions"}, "invalid_url", "url", "does not match"),
    ({"body": {"model": "m"}}, "missing_required_parameter", "prompt", "'prompt'"),
]


@pytest.mark.parametrize(("change", "code", "param", "says"), WRONG)
def test_wrong_lines(change, code, param, says):
    if isinstance(change, dict):
        line = json.dumps({k: v for k, v in {**GOOD, **change}.items() if v is not ...}).encode()
    else:
        line = change.encode() if isinstance(change, str) else change
    found, errors = scan(request("first") + line + b"\n" + request("last"))
    assert [x.custom_id for x in found] == ["first", "last"], "the other lines are still read"
    [error] = errors
    assert (error.line, error.code, error.param) == (2, code, param)
    assert says in error.message


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"7", b"null"])
def test_a_body_that_is_not_an_object(body):
    data = request("a").replace(json.dumps(GOOD["body"]).encode(), body)
    _, [error] = scan(data, check=lambda endpoint, body: "m")
    assert (error.code, error.param) == ("invalid_type", "body")


def test_offsets_of_lines():
    data = b"\xef\xbb\xbf" + request("a") + b"\n   \n" + request("b").rstrip() + b"\r\n" + request("c").rstrip()
    found, errors = scan(data)
    assert errors == []
    assert [(x.number, x.custom_id) for x in found] == [(1, "a"), (4, "b"), (5, "c")]
    for line in found:
        part = data[line.offset : line.offset + line.num_bytes]
        assert json.loads(part)["custom_id"] == line.custom_id
        assert json.loads(lines.body_of(part)) == GOOD["body"]


def test_limits():
    assert scan(b"")[1][0].code == "empty_file"
    assert scan(b"\n \n")[1][0].code == "empty_file"
    found, errors = scan(request("a") + request("b", "x" * 500) + request("c"), max_line_bytes=300)
    assert [x.custom_id for x in found] == ["a", "c"]
    assert [(e.line, e.code) for e in errors] == [(2, "line_too_long")]
    assert "limit of 300 bytes" in errors[0].message
    exact = len(request("a")) - 1
    assert scan(request("a") + request("b"), max_line_bytes=exact)[1] == [], "the newline does not count"
    found, errors = scan(b"".join(request(str(i)) for i in range(5)), max_lines=3)
    assert (len(found), [(e.line, e.code) for e in errors]) == (3, [(4, "too_many_requests")])


def test_a_file_is_read_in_chunks():
    data = b"".join(request(str(i)) for i in range(2 * lines.CHUNK_LINES + 1))
    check = lambda endpoint, body: "demo"  # noqa: E731
    chunks = list(lines.scan(io.BytesIO(data), endpoint=ENDPOINT, check=check))
    assert [len(c.lines) for c in chunks] == [lines.CHUNK_LINES, lines.CHUNK_LINES, 1]
    assert chunks[0].models == {"demo"}


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        ("/v1/completions", {"prompt": "x" * 398}, 100 + 16),
        ("/v1/completions", {"prompt": "x" * 398, "max_tokens": 50, "n": 3}, 100 + 150),
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 0}, 3),
        ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1}, 4),
        ("/v1/chat/completions", {"messages": [], "max_completion_tokens": 9}, 9),
        ("/v1/chat/completions", {"messages": []}, 256),
        ("/v1/embeddings", {"input": "x" * 98}, 25),
        ("/v1/responses", {"input": "x" * 98, "instructions": "x" * 38, "max_output_tokens": 7}, 25 + 10 + 7),
        ("/v1/messages", {"system": "x" * 38, "messages": []}, 10 + 256),
        ("/v1/completions", {"prompt": "", "max_tokens": -3, "n": "many"}, 16),
    ],
)
def test_estimates(endpoint, body, expected):
    assert planned(body, endpoint=endpoint).num_tokens == expected


def planned(body, endpoint=ENDPOINT) -> Line:
    """The line of a file with this one request."""
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    [found], _ = scan(json.dumps(line).encode(), endpoint=endpoint, check=lambda endpoint, body: "m")
    return found


def test_groups():
    def key(prompt, model="m"):
        return planned({"model": model, "prompt": prompt, "max_tokens": 7}).group_key

    prefix = "o" * 300
    assert key(prefix + "a") == key(prefix + "b")
    assert key(prefix) != key(prefix, model="n")
    assert key("short a") != key("short b")
    assert -(2**63) <= key("") < 2**63


def test_the_order():
    """The example in the docstring of store/order.py. Ties between groups go by their key."""
    a, b, c = 1, 2, 3
    given = [(a, 90), (b, 10), (a, 20), (b, 12), (c, 100)]
    kept = [
        Line(number=i, custom_id=str(i), offset=0, num_bytes=1, group_key=k, num_tokens=n)
        for i, (k, n) in enumerate(given, start=1)
    ]
    assert [(x.group_key, x.num_tokens) for x in order(kept)] == [(a, 90), (a, 20), (c, 100), (b, 12), (b, 10)]
    assert order([]) == []
    assert [length_class(n) for n in (0, 1, 2, 3, 4, 127, 128)] == [0, 1, 2, 2, 3, 7, 8]


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86_400), ("90m", 5400), ("2d", 172_800), ("1s", 1)])
def test_windows(text, seconds):
    assert parse_window(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "0h", "-1h", "1.5h", "366d", "24h ", "24H", "99999999999h"])
def test_wrong_windows(text):
    with pytest.raises(RequestError, match="completion_window"):
        parse_window(text)
