"""Token buckets and accounts: pure arithmetic, with a fake clock."""

import pytest

from cluster.keys.accounts import Accounts, RequestUsage, format_duration
from cluster.keys.bucket import Bucket
from cluster.keys.key import ApiKey, Limits
from workers.errors import OverloadedError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(**limits) -> ApiKey:
    return ApiKey(id="key-1", name="x", sha256="0" * 64, created=0, limits=Limits(**limits))


def test_the_worked_example():
    bucket = Bucket(60, 0.0)
    bucket.take(30, 0.0)
    assert (bucket.level(0.0), bucket.wait_s(40, 0.0)) == (30, 10)
    bucket.take(50, 0.0)
    assert bucket.level(0.0) == -20
    assert bucket.wait_s(1, 0.0) == 21
    assert bucket.level(20.0) == pytest.approx(0)
    assert bucket.level(1e9) == 60, "never more than a minute's worth"
    assert bucket.wait_s(1000, 1e9) == 0, "an amount above the capacity needs a full bucket"
    bucket.take(-5, 1e9)
    assert bucket.level(1e9) == 60


def test_requests_per_minute():
    clock = Clock()
    accounts, k = Accounts(clock=clock), key(requests_per_minute=2)
    for _ in range(2):
        with accounts.running(accounts.usage(k, "/v1/x")):
            pass
    with (
        pytest.raises(OverloadedError, match="2 requests per minute") as e,
        accounts.running(accounts.usage(k, "/v1/x")),
    ):
        pass
    assert e.value.retry_after_s == 30
    clock.now += 30
    with accounts.running(accounts.usage(k, "/v1/x")):
        pass


def test_concurrency_counts_running_requests_and_survives_changed_limits():
    accounts = Accounts(clock=Clock())
    first, second = key(max_concurrency=1), key(max_concurrency=2)
    with accounts.running(accounts.usage(first, "")):
        with pytest.raises(OverloadedError, match="1 concurrent requests"), accounts.running(accounts.usage(first, "")):
            pass
        with (
            accounts.running(accounts.usage(second, "")),
            pytest.raises(OverloadedError),
            accounts.running(accounts.usage(second, "")),
        ):
            pass
    with accounts.running(accounts.usage(first, "")):
        pass


def test_tokens_per_minute_reserve_the_prompt_and_charge_the_output():
    clock = Clock()
    accounts, k = Accounts(clock=clock), key(tokens_per_minute=60)
    usage = accounts.usage(k, "")
    with usage.reserve(20):
        usage.add_output_tokens(60)  # into debt by 20
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (20, 60)
    with pytest.raises(OverloadedError, match="-20 are left") as e, accounts.usage(k, "").reserve(10):
        pass
    assert e.value.retry_after_s == 30
    clock.now += 30
    with accounts.usage(k, "").reserve(10):
        pass


def test_a_prompt_larger_than_the_limit_needs_a_full_bucket():
    clock = Clock()
    accounts, k = Accounts(clock=clock), key(tokens_per_minute=60)
    with accounts.usage(k, "").reserve(100):
        pass
    with pytest.raises(OverloadedError) as e, accounts.usage(k, "").reserve(100):
        pass
    assert e.value.retry_after_s == 100


def test_a_request_that_the_server_refuses_costs_no_tokens():
    accounts, k = Accounts(clock=Clock()), key(tokens_per_minute=60)
    usage: RequestUsage = accounts.usage(k, "")
    with pytest.raises(OverloadedError, match="full"), usage.reserve(50):
        raise OverloadedError("full", retry_after_s=1)
    assert usage.num_prompt_tokens == 0
    with usage.reserve(60):
        pass


def test_each_gateway_grants_its_share_rounded_up():
    accounts = Accounts(num_gateways=4, clock=Clock())
    usage = accounts.usage(key(requests_per_minute=10, tokens_per_minute=1000, max_concurrency=1), "")
    headers = usage.rate_limit_headers()
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-limit-tokens"]) == ("3", "250")
    with accounts.running(usage):
        pass


def test_the_headers_show_what_is_left():
    clock = Clock()
    accounts, k = Accounts(clock=clock), key(tokens_per_minute=600, requests_per_minute=60)
    usage = accounts.usage(k, "")
    with accounts.running(usage), usage.reserve(100):
        usage.add_output_tokens(5)
    assert usage.rate_limit_headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "495",
        "x-ratelimit-reset-tokens": "10.5s",
    }
    assert accounts.usage(key(), "").rate_limit_headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (1, "1s"), (59.94, "59.9s"), (60, "1m0s"), (119.7, "2m0s")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
