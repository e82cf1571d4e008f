"""Options that turn into numbers of replicas and into addresses."""

import pytest

from cluster.cli.options import parse_replicas
from cluster.system.net import url_of


@pytest.mark.parametrize(
    ("text", "expected"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4)), ("0:2", (0, 2)), (" 2:2 ", (2, 2))]
)
def test_replicas(text, expected):
    assert parse_replicas(text) == expected


@pytest.mark.parametrize("text", ["0", "0:0", "3:2", "-1", "1:", ":2", "1:2:3", "two", "", "1.5", "99999"])
def test_no_number_of_replicas(text):
    with pytest.raises(ValueError, match="MIN:MAX"):
        parse_replicas(text)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::1", "http://[fd00::1]:80"),
        ("gpu-7", "http://gpu-7:80"),
    ],
)
def test_the_url_shown_can_be_opened_here(host, url):
    assert url_of(host, 80) == url
