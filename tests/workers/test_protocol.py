"""The wire format: frames of other versions, and the hashes of blocks."""

import hashlib
from array import array

import msgspec
import pytest

from workers.protocol import Abort, GenerateRequest, SamplingParams, encode_frame, frame_length, hash_block, root_hash

REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=1, seed=0))


def test_a_request_without_an_adapter_travels_as_before():
    body = msgspec.msgpack.encode(REQUEST)
    assert "adapter" not in msgspec.msgpack.decode(body)
    assert msgspec.msgpack.decode(body, type=GenerateRequest) == REQUEST


def test_a_request_carries_its_adapter():
    request = msgspec.structs.replace(REQUEST, adapter="law")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest).adapter == "law"


def test_the_base_models_hashes_are_what_they_were():
    tokens = [3, 5, 7]
    digest = hashlib.blake2b(array("i", tokens).tobytes(), digest_size=16).digest()
    assert hash_block(root_hash(None), tokens) == digest


def test_each_adapter_has_hashes_of_its_own():
    firsts = {hash_block(root_hash(adapter), [3, 5, 7]) for adapter in (None, "", "a", "b", "a" * 500)}
    assert len(firsts) == 5
    assert root_hash("abcd") != hash_block(b"", [int.from_bytes(b"abcd", "little")]), "a name is not taken for tokens"


def test_a_frame_is_its_length_and_the_message():
    frame = encode_frame(Abort(request_id="r"))
    assert frame_length(frame[:4]) == len(frame) - 4
    with pytest.raises(ValueError, match="at most 10"):
        frame_length((11).to_bytes(4, "big"), 10)
