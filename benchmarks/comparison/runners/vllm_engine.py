"""vLLM's engine in one process: generation step by step. Runs in the peer's own environment: `python vllm_engine.py JOB`, see timing.py."""

import itertools
from collections.abc import Iterator, Sequence

import timing
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine


class Steps:
    """The engine as timing.py wants it."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._ids = itertools.count()

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        sequences = {}
        for i, prompt in enumerate(prompts):
            request_id = str(next(self._ids))
            sequences[request_id] = i
            self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        seen = dict.fromkeys(sequences, 0)
        while self.engine.has_unfinished_requests():
            step = []
            for output in self.engine.step():
                num_tokens = len(output.outputs[0].token_ids)
                step += [sequences[output.request_id]] * (num_tokens - seen[output.request_id])
                seen[output.request_id] = num_tokens
            yield step


def main() -> None:
    job = timing.read_job()
    args = EngineArgs(
        model=job["model"],
        dtype=job["dtype"],
        max_num_seqs=max(job["batches"]),
        max_model_len=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(args)
    rates = timing.rates(Steps(engine).generate, job)
    timing.write_result({"version": vllm.__version__} | rates)


if __name__ == "__main__":
    main()
