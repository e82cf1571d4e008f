"""Tokens sampled on the GPU against the CPU specification: the same logits, parameters, seeds and positions."""

import math
import random

import torch

from workers.gpu_check.report import Report
from workers.protocol import SamplingParams
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.pending import DeviceRow
from workers.sampling.sampler import Sampled, SamplingRow, sample

VOCAB_SIZE, NUM_ROWS, NUM_STEPS, EOS = 32_768, 64, 20, (2,)
# Sums of 32,768 numbers in float32, in another order.
MAX_LOGPROB_ERROR = 1e-4


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=64,
        temperature=rng.choice((0.0, 0.3, 1.0, 1.7)),
        top_p=rng.choice((1.0, 0.95, 0.5)),
        top_k=rng.choice((0, 1, 40, 2000)),
        min_p=rng.choice((0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        presence_penalty=rng.choice((0.0, 0.7)),
        frequency_penalty=rng.choice((0.0, 0.2)),
        logit_bias={rng.randrange(VOCAB_SIZE): 4.0} if rng.random() < 0.2 else {},
        seed=rng.getrandbits(40),
        logprobs=rng.choice((None, None, 3)),
    )


def check(report: Report, device: torch.device, *, num_steps: int = NUM_STEPS) -> None:
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    params = [random_params(rng) for _ in range(NUM_ROWS)]
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 50))] for _ in range(NUM_ROWS)]
    histories = [list(prompt) for prompt in prompts]
    sampler = DeviceSampler(vocab_size=VOCAB_SIZE, max_num_seqs=NUM_ROWS, device=device, eos_token_ids=EOS)
    num_equal, worst = 0, 0.0
    for _ in range(num_steps):
        logits = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator) * 3
        rows = [
            SamplingRow(p, history, len(prompt)) for p, history, prompt in zip(params, histories, prompts, strict=True)
        ]
        device_rows = [
            DeviceRow(str(i), row.params, row.token_ids, row.num_prompt_tokens) for i, row in enumerate(rows)
        ]
        got = sampler.sample(logits.to(device), device_rows).read()
        expected = sample(logits.clone(), rows, eos_token_ids=EOS)
        num_equal += sum(a.token_id == b.token_id for a, b in zip(got, expected, strict=True))
        worst = max([worst, *(logprob_error(a, b) for a, b in zip(got, expected, strict=True))])
        for history, one in zip(histories, got, strict=True):
            # The next step follows the tokens that the sampler counted itself.
            history.append(one.token_id or 0)
    total = NUM_ROWS * num_steps
    report.check("tokens equal the CPU specification's", num_equal == total, f"{num_equal:,} of {total:,}")
    report.check("log-probabilities equal the CPU's", worst < MAX_LOGPROB_ERROR, f"{worst:.1e} off at most")


def logprob_error(got: Sampled, expected: Sampled) -> float:
    """The largest difference; infinite where tokens or ranks differ. 0 where none were requested."""
    a, b = got.logprob, expected.logprob
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if (a.token_id, a.rank, [i for i, _ in a.top]) != (b.token_id, b.rank, [i for i, _ in b.top]):
        return math.inf
    pairs = zip([a.logprob, *(x for _, x in a.top)], [b.logprob, *(x for _, x in b.top)], strict=True)
    return max(abs(x - y) for x, y in pairs)
