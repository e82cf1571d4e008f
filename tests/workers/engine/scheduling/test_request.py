"""Checks on arrival: a request that can never work is refused and the field named; an unusual but possible one is accepted."""

from typing import Any

import pytest

from workers.engine.scheduling.request import make_request
from workers.errors import RequestError
from workers.protocol import GenerateRequest, SamplingParams, root_hash

VOCAB_SIZE = 256
MAX_MODEL_LEN = 512


def admit(prompt: list[int], params: dict[str, Any], **message: Any):
    sampling = SamplingParams(**({"max_tokens": 16, "seed": 0} | params))
    request = GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, **message)
    return make_request(request, arrival=0, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ([], {}, "prompt", "no tokens"),
        ([256], {}, "prompt", "token id 256"),
        ([-1], {}, "prompt", "token id -1"),
        ([5] * 512, {}, "prompt", "512 tokens"),
        ([5] * 513, {"max_tokens": 0}, "prompt", "513 tokens"),
        ([5], {"temperature": -0.1}, "temperature", "-0.1"),
        ([5], {"temperature": float("nan")}, "temperature", "nan"),
        ([5], {"temperature": float("inf")}, "temperature", "inf"),
        ([5], {"top_p": 0.0}, "top_p", "above 0"),
        ([5], {"top_p": 1.5}, "top_p", "1.5"),
        ([5], {"top_k": -1}, "top_k", "-1"),
        ([5], {"top_k": 2**63}, "top_k", "2147483647"),
        ([5], {"min_p": 2.0}, "min_p", "2.0"),
        ([5], {"repetition_penalty": 0.0}, "repetition_penalty", "0.0"),
        ([5], {"presence_penalty": float("-inf")}, "presence_penalty", "inf"),
        ([5], {"max_tokens": -1}, "max_tokens", "-1"),
        ([5], {"max_tokens": 3, "min_tokens": 4}, "min_tokens", "4"),
        ([5], {"max_tokens": 0, "min_tokens": 1}, "min_tokens", "1"),
        ([5], {"logit_bias": {999: 1.0}}, "logit_bias", "999"),
        ([5], {"logit_bias": {9: float("nan")}}, "logit_bias", "nan"),
        ([5], {"logprobs": 101}, "logprobs", "101"),
        ([5], {"stop_token_ids": (256,)}, "stop_token_ids", "256"),
        ([5], {"seed": 2**65}, "seed", "seed"),
        ([5], {"prompt_logprobs": -1}, "prompt_logprobs", "-1"),
        ([5], {"prompt_logprobs": 101}, "prompt_logprobs", "101"),
        ([5, 6], {"prompt_logprobs": 1, "prompt_logprobs_start": 2}, "prompt_logprobs_start", "0 to 1"),
        ([5, 6], {"prompt_logprobs": 1, "prompt_logprobs_start": -1}, "prompt_logprobs_start", "-1"),
        ([5], {"allowed_token_ids": ()}, "allowed_token_ids", "empty"),
        ([5], {"allowed_token_ids": (3, 256)}, "allowed_token_ids", "256"),
        ([5], {"bad_words": ((3, 256),)}, "bad_words", "256"),
        ([5], {"bad_words": ((3,), ())}, "bad_words", "without tokens"),
        ([5], {"bad_words": ((3,),) * 1001}, "bad_words", "1000"),
        ([5], {"bad_words": ((3,) * 10_001,)}, "bad_words", "10000"),
        *(
            ([5], {"grammar": 'start: "x"', name: value}, name, "structured_outputs")
            for name, value in {
                "ignore_eos": True,
                "min_tokens": 1,
                "allowed_token_ids": (3,),
                "bad_words": ((3,),),
            }.items()
        ),
    ],
)
def test_a_request_that_can_never_work_is_refused(prompt, params, param, words):
    with pytest.raises(RequestError) as caught:
        admit(prompt, params)
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message", "param"),
    [
        ({"max_tokens": 1}, {"embed": True}, "max_tokens"),
        ({"max_tokens": 0, "prompt_logprobs": 0}, {"embed": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, {"output_token_ids": [7]}, "max_tokens"),
        ({"max_tokens": 1}, {"output_token_ids": [7]}, "max_tokens"),
        ({"max_tokens": 2}, {"output_token_ids": [256]}, "output_token_ids"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(params, message, param):
    with pytest.raises(RequestError) as caught:
        admit([5], params, **message)
    assert caught.value.param == param


def test_the_log_probabilities_of_one_prompt_fit_into_a_frame():
    sampling = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=99)
    long = GenerateRequest(request_id="r", prompt_token_ids=[5] * 10_001, sampling=sampling)
    with pytest.raises(RequestError, match="1,000,000"):
        make_request(long, arrival=0, vocab_size=VOCAB_SIZE, max_model_len=20_000)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5] * 511, {}, {}),
        ([5] * 512, {"max_tokens": 0}, {"embed": True}),
        ([5] * 512, {"max_tokens": 0, "prompt_logprobs": 100, "prompt_logprobs_start": 511}, {}),
        ([5], {"max_tokens": 2, "grammar": 'start: "x"', "stop_token_ids": (3,)}, {"output_token_ids": [7]}),
        ([5], {"allowed_token_ids": (0, 255), "bad_words": ((0, 255), (3,)), "min_tokens": 3}, {}),
    ],
)
def test_an_unusual_request_is_accepted(prompt, params, message):
    assert admit(prompt, params, **message).num_prompt_tokens == len(prompt)


def test_an_adapter_that_is_not_loaded_is_refused():
    with pytest.raises(RequestError, match=r"The adapter 'law' is not loaded on this replica\.") as caught:
        admit([5], {}, adapter="law")
    assert caught.value.param == "adapter"


def test_a_request_carries_its_adapter():
    sampling = SamplingParams(max_tokens=2, seed=0)
    message = GenerateRequest(request_id="r", prompt_token_ids=[5], sampling=sampling, adapter="law")
    request = make_request(message, arrival=0, vocab_size=9, max_model_len=9, adapters={"law"})
    assert request.adapter == "law"
    assert request.sequence.root_hash == root_hash("law")
    assert admit([5], {}).sequence.root_hash == b"", "the base model's hashes are what they were"
