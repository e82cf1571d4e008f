"""llama.cpp through the C interface of llama-cpp-python: generation step by step, log-probabilities of given tokens, token ids of texts.

Runs in the peer's own environment: `python llama.py JOB`, see timing.py.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import timing


class Llama:
    """One model with one context of `num_seqs` sequences, each of up to `max_len` tokens."""

    def __init__(self, path: str, *, num_seqs: int, max_len: int, num_threads: int, extra_buffers: bool = True) -> None:
        """extra_buffers: whether weights may be laid out again for the CPU's instructions, AMX among them."""
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = extra_buffers
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}.")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_seqs * max_len
        params.n_seq_max = num_seqs
        params.n_batch = 2048
        params.n_threads = params.n_threads_batch = num_threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        """Greedy. Prompts are computed in as few calls as `n_batch` allows."""
        self._clear()
        last = [0] * len(prompts)
        rows: list[tuple[int, int, int, bool]] = []
        for seq, prompt in enumerate(prompts):
            if len(rows) + len(prompt) > 2048:
                yield self._step(rows, last)
                rows = []
            rows += [(token, position, seq, position == len(prompt) - 1) for position, token in enumerate(prompt)]
        yield self._step(rows, last)
        for n in range(1, max_tokens):
            rows = [(last[seq], len(prompt) + n - 1, seq, True) for seq, prompt in enumerate(prompts)]
            yield self._step(rows, last)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[num_tokens, vocab_size] float32 of one sequence."""
        self._clear()
        self._decode([(token, position, 0, True) for position, token in enumerate(tokens)])
        return np.stack([self._row(i).copy() for i in range(len(tokens))])

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _step(self, rows: list[tuple[int, int, int, bool]], last: list[int]) -> list[int]:
        self._decode(rows)
        sampled = [(i, seq) for i, (_, _, seq, wanted) in enumerate(rows) if wanted]
        for i, seq in sampled:
            last[seq] = int(self._row(i).argmax())
        return [seq for _, seq in sampled]

    def _row(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token id, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = wanted
        if status := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode returned {status}.")


def token_ids(path: str, texts: Sequence[str]) -> list[list[int]]:
    """Of texts in which special tokens may stand, by the vocabulary of the file alone."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_model_load_from_file(path.encode(), params))
    found = []
    for text in texts:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        num_ids = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), False, True)
        found.append(list(ids[:num_ids]))
    return found


def logprobs(model: Llama, sequences: Sequence[list[int]]) -> list[list[float]]:
    """The log-probability of each token of each sequence after its first, in nats."""
    found = []
    for tokens in sequences:
        logits = model.logits(tokens).astype(np.float64)[:-1]
        logits -= logits.max(axis=1, keepdims=True)
        normalized = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append(normalized[np.arange(len(tokens) - 1), tokens[1:]].tolist())
    return found


def main() -> None:
    job = timing.read_job()
    num_threads, extra_buffers = len(os.sched_getaffinity(0)), job.get("extra_buffers", True)
    result: dict[str, Any] = {"system": llama_cpp.llama_print_system_info().decode(), "version": llama_cpp.__version__}
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    if job["measure"] == "tokens":
        result["tokens"] = token_ids(job["model"], job["texts"])
    elif job["measure"] == "rates":
        max_len = timing.PREFILL_TOKENS + 1
        model = Llama(
            job["model"],
            num_seqs=max(job["batches"]),
            max_len=max_len,
            num_threads=num_threads,
            extra_buffers=extra_buffers,
        )
        result |= timing.rates(model.generate, job | {"vocab_size": model.vocab_size})
    else:
        max_len = max(map(len, job["sequences"]))
        model = Llama(job["model"], num_seqs=1, max_len=max_len, num_threads=num_threads, extra_buffers=extra_buffers)
        result["logprobs"] = logprobs(model, job["sequences"])
    timing.write_result(result)


if __name__ == "__main__":
    main()
