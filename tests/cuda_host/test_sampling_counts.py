"""What sampling and outputs of prompts ask of the device: no wait but the last read, whatever the parameters, and no more for more rows."""

import numpy as np
import pytest
import torch
from cuda_host.engines import make_config, make_core, make_request
from cuda_host.step_table import compare

from workers.protocol import GenerateRequest, SamplingParams
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.pending import DeviceRow

pytestmark = pytest.mark.cuda_host

VOCAB = 32_768
KINDS = (
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
    {"top_k": 50, "presence_penalty": 0.5, "logit_bias": {3: 1.0, 4: 2.0}, "logprobs": 0},
    {"min_p": 0.1, "min_tokens": 9, "bad_words": ((7,), (3, 8)), "allowed_token_ids": (3, 4, 9)},
)


def rows_of(num_rows, num_output_tokens):
    mask = np.full(VOCAB // 8, 255, dtype=np.uint8)
    return [
        DeviceRow(
            str(i),
            PARAMS[i],
            [5] * (10 + i + num_output_tokens),
            10 + i,
            mask=mask if i % 8 == 0 else None,
        )
        for i in range(num_rows)
    ]


PARAMS = [SamplingParams(max_tokens=100, seed=i, **KINDS[i % 4]) for i in range(64)]


@pytest.mark.parametrize("kind", ["new", "known"])
def test_sampling_does_not_wait(device, kind):
    logits = torch.zeros(64, VOCAB, device="cuda")
    summaries = []
    for num_rows in (8, 64):
        sampler = DeviceSampler(vocab_size=VOCAB, max_num_seqs=64, device="cuda", eos_token_ids=(2,))
        if kind == "known":
            sampler.sample(logits[:num_rows], rows_of(num_rows, 0)).read()
        rows = rows_of(num_rows, 0 if kind == "new" else 1)
        with device.recorded() as record:
            pending = sampler.sample(logits[:num_rows], rows)
        assert record.num_synchronizations == 0, record.calls
        compare(f"sampling, all parameters, {kind} requests", record)
        summaries.append(record.summary())
        with device.recorded() as reading:
            assert len(pending.read()) == num_rows
        assert reading.num_synchronizations <= 1
        assert reading.num_launches == 0
    assert summaries[0] == summaries[1], "more for more rows"


def test_outputs_of_prompts_do_not_wait(device):
    """Six prompts at once: of half of them the log-probabilities, of the others an embedding."""
    core = make_core(make_config(max_num_seqs=16, max_num_batched_tokens=1024, cuda_graphs=False))
    for i in range(6):
        wanted = {"embed": True} if i % 2 else {}
        params = SamplingParams(max_tokens=0, seed=0, prompt_logprobs=None if i % 2 else 5)
        prompt = [5 + i] * 150
        core.add_request(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=params, **wanted))
    num_deltas = 0
    while core.has_work():
        with device.recorded() as record:
            num_deltas += len(core.step())
        assert record.num_synchronizations <= 1, record.calls
        assert not any("pageable" in kind for kind in record.copies), record.copies
    assert num_deltas == 6


def test_a_row_that_is_dropped_does_not_wait(device):
    """One request compares with its history, so each step reads all tokens before it samples. The other one stops: the row that was
    launched for it is left out.
    """
    core = make_core(make_config(max_num_seqs=4, max_num_batched_tokens=64, cuda_graphs=False))
    core.add_request(make_request("stops", 5, max_tokens=50, stop_token_ids=(0,), min_tokens=3))
    core.add_request(make_request("reads its history", 5, max_tokens=12, bad_words=((7, 8),)))
    copies = []
    while core.has_work():
        with device.recorded() as record:
            core.step()
        assert record.num_synchronizations <= 1, record.calls
        assert not any("pageable" in kind for kind in record.copies), record.copies
        copies.append(record.copies["H2D pinned"])
    assert copies.count(3) == 1, "the batch, the index of the rows that are left, and the parameters"
    assert max(copies) == 3
