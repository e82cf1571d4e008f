"""JSON lines and tables become the lines of a batch file; a row that cannot is named in the error."""

import io
import json

import pytest
from support.batch.batches import request

from cluster.cli.batch.convert import LineTemplate, convert, guess_format
from workers.errors import ConfigError, RequestError

PLAIN = LineTemplate(model="demo")


def converted(data: bytes, kind="jsonl", template=PLAIN):
    return [json.loads(line) for line in convert(io.BytesIO(data), format=kind, template=template)]


def test_plain_lines():
    found = converted(
        b'{"prompt": "a", "max_tokens": 3}\n\n{"id": 7, "prompt": "b", "model": "other"}\n{"custom_id": "x", "prompt": "c"}'
    )
    assert found == [
        {
            "custom_id": "line-1",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "demo", "prompt": "a", "max_tokens": 3},
        },
        {"custom_id": "7", "method": "POST", "url": "/v1/completions", "body": {"model": "other", "prompt": "b"}},
        {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "c"}},
    ]


@pytest.mark.parametrize(
    ("row", "endpoint", "body"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "q"}]},
        ),
        ({"input": "q"}, "/v1/embeddings", {"input": "q"}),
        ({"prompt": "q", "temperature": 0.5}, "/v1/completions", {"prompt": "q", "temperature": 0.5, "max_tokens": 9}),
    ],
)
def test_the_row_decides_the_endpoint(row, endpoint, body):
    [line] = converted(json.dumps(row).encode(), template=LineTemplate(model="demo", defaults={"max_tokens": 9}))
    assert line["url"] == endpoint
    assert line["body"] == {"model": "demo", "max_tokens": 9, **body}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "q"}]}),
        ("/v1/embeddings", {"input": "q"}),
        ("/v1/completions", {"prompt": "q"}),
        ("/v1/responses", {"input": "q"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "q"}]}),
    ],
)
def test_a_prompt_serves_every_endpoint(endpoint, body):
    [line] = converted(b'{"prompt": "q"}', template=LineTemplate(model="demo", endpoint=endpoint))
    assert (line["url"], line["body"]) == (endpoint, {"model": "demo", **body})


def test_the_limit_of_tokens_has_another_name_in_responses():
    template = LineTemplate(model="demo", endpoint="/v1/responses", defaults={"max_tokens": 9})
    found = converted(b'{"input": "q"}\n{"input": "q", "max_output_tokens": 3}', template=template)
    assert [line["body"] for line in found] == [{"model": "demo", "input": "q", "max_output_tokens": n} for n in (9, 3)]


def test_lines_of_a_batch_file_stay_as_they_are():
    assert b"".join(convert(io.BytesIO(request("a") + request("b")), format="jsonl", template=PLAIN)) == request(
        "a"
    ) + request("b")


def test_csv():
    data = '\ufeffid,prompt,max_tokens,temperature,note\n1,"a, ""quoted""\nand long",5,0.5,x\n2,ü,,,\n'.encode()
    found = converted(data, "csv")
    assert [x["custom_id"] for x in found] == ["1", "2"]
    assert found[0]["body"] == {"model": "demo", "prompt": 'a, "quoted"\nand long', "max_tokens": 5, "temperature": 0.5}
    assert found[1]["body"] == {"model": "demo", "prompt": "ü"}


def test_a_template_of_columns():
    template = LineTemplate(
        model="demo", endpoint="/v1/chat/completions", text="Translate to {lang}: {text}", defaults={"seed": 1}
    )
    [line] = converted(b"lang,text,top_p\nfr,hello {x},0.5\n", "csv", template)
    content = "Translate to fr: hello {x}"
    assert line["body"] == {
        "model": "demo",
        "seed": 1,
        "top_p": 0.5,
        "messages": [{"role": "user", "content": content}],
    }
    with pytest.raises(RequestError, match="Row 1 has no 'word'"):
        converted(b"lang\nfr\n", "csv", LineTemplate(model="demo", text="{word}"))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "id": [f"p{i}" for i in range(3000)],
            "prompt": ["q"] * 3000,
            "max_tokens": [4, None] * 1500,
            "note": ["x"] * 3000,
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    found = converted((tmp_path / "in.parquet").read_bytes(), "parquet")
    assert [x["custom_id"] for x in found] == [f"p{i}" for i in range(3000)]
    assert found[0]["body"] == {"model": "demo", "prompt": "q", "max_tokens": 4}
    assert found[1]["body"] == {"model": "demo", "prompt": "q"}
    with pytest.raises(RequestError, match="cannot be read"):
        converted(b"no parquet at all", "parquet")


WRONG = [
    (b'{"prompt": "a"}\n{]', "jsonl", "Line 2 is not a JSON object"),
    (b"[1]", "jsonl", "Line 1 is not a JSON object"),
    (b'{"text": "a"}', "jsonl", "Row 1 has none of 'prompt', 'messages' and 'input'; it has text"),
    (b'{"prompt": "a", "input": "b"}', "jsonl", "'prompt' and 'input'"),
    (
        b'{"prompt": "a"}\n{"input": "b"}',
        "jsonl",
        "Row 2 is for /v1/embeddings, but the rows before it are for /v1/completions",
    ),
    (b"prompt,max_tokens\na,many\n", "csv", "Row 1: 'max_tokens' is 'many'"),
    (b"prompt\na,b\n", "csv", "more fields than the header"),
    (b"prompt\n\xff\n", "csv", "cannot be read"),
    (b'prompt\n"a\n', "csv", "cannot be read"),
]


@pytest.mark.parametrize(("data", "kind", "says"), WRONG)
def test_rows_that_cannot_be_requests(data, kind, says):
    with pytest.raises(RequestError) as caught:
        converted(data, kind)
    assert says in str(caught.value)


def test_a_field_of_another_endpoint():
    with pytest.raises(RequestError, match="'messages', which /v1/embeddings does not accept"):
        converted(b'{"messages": []}\n', template=LineTemplate(model="m", endpoint="/v1/embeddings"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("in.jsonl", "jsonl"), ("s3://b/x.NDJSON", "jsonl"), ("a.csv", "csv"), ("a.b.parquet", "parquet")],
)
def test_formats(name, kind):
    assert guess_format(name) == kind


def test_an_unknown_format():
    with pytest.raises(ConfigError, match="--format"):
        guess_format("in.txt")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("csv", b"key,prompt,id\nk1,a,7\n"),
        ("jsonl", b'{"key": "k1", "prompt": "a", "id": 7, "logit_bias": {"1": 2}}\n'),
    ],
)
def test_a_column_names_the_lines(kind, data):
    [line] = converted(data, kind, LineTemplate(model="demo", custom_id="{key}"))
    assert line["custom_id"] == "k1"
    assert {"key", "id"} & line["body"].keys() == set(), "a column that names the line is not a request parameter"
    [line] = converted(data, kind, LineTemplate(model="demo", custom_id="{prompt}-{key}", text="Say {prompt}"))
    assert (line["custom_id"], line["body"]["prompt"]) == ("a-k1", "Say a")


def test_a_row_without_the_column_that_names_it_is_refused():
    with pytest.raises(RequestError, match=r"Row 2 has no 'key'"):
        converted(b"key,prompt\nk1,a\n,b\n", "csv", LineTemplate(model="demo", custom_id="{key}"))
