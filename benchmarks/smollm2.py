"""SmolLM2 135M Instruct from its GGUF file (Q4_1): prompt ids, greedy answers, perplexity and speed beside transformers and llama.cpp.

    make smollm2
    python benchmarks/smollm2.py ~/.cache/tramontane/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output benchmarks/results/smollm2.md

transformers computes the dequantised weights in float32, which our engine then loads as a dense checkpoint too. llama.cpp computes the file
itself. `--parts ids,answers,perplexity,speed` picks some; llama.cpp is left out where it is not installed (`make bench-peers`).
"""

import argparse
import math
import os
import platform
import pydoc_data.topics
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from comparison.processes import MeasurementError, run_job  # noqa: E402
from sections import write_section  # noqa: E402
from support.checkpoints.gguf_files import dequantized_model  # noqa: E402
from support.ranks.rank_threads import run_ranks  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM  # noqa: E402

from cluster.text.chat.template import Message  # noqa: E402
from cluster.text.load import load_text  # noqa: E402
from workers.checkpoint.model_config import load_model_config  # noqa: E402
from workers.config import EngineConfig  # noqa: E402
from workers.engine.build import build_runner  # noqa: E402
from workers.engine.core import EngineCore  # noqa: E402
from workers.engine.follower import run_follower  # noqa: E402
from workers.engine.llm_engine import LLMEngine, run_requests  # noqa: E402
from workers.protocol import GenerateRequest, SamplingParams  # noqa: E402

RUNNERS = ROOT / "benchmarks" / "comparison" / "runners"
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about autumn.",
    "Name three primary colors.",
    "How do I boil an egg?",
    "What is photosynthesis?",
    "Translate 'good morning' into Spanish.",
    "Tell me a fun fact about octopuses.",
    "What is 17 + 25?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "List 5 healthy breakfast ideas.",
    "Explain gravity to a child.",
    "What is the largest planet in the solar system?",
    "Give me a synonym for 'happy'.",
    "What happened in 1969?",
    "Describe the water cycle.",
    "Suggest a name for a cat.",
    "How many days are in a leap year?",
    "Write one sentence about the sea.",
)
ANSWER_TOKENS, MARGIN = 64, 0.05
TEXT_TOKENS = 2000
TOPICS = (
    "compound",
    "naming",
    "execmodel",
    "objects",
    "typesseq",
)  # of Python's own documentation, part of its library
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--parts", default="ids,answers,perplexity,speed")
    parser.add_argument("--llama-python", type=Path, default=ROOT / ".venv-llama" / "bin" / "python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    measure: dict[str, Callable[[], Iterator[str]]] = {
        "ids": lambda: ids(args),
        "answers": lambda: answers(args),
        "perplexity": lambda: perplexity(args),
        "speed": lambda: speed(args),
    }
    if args.output is not None and not args.output.exists():
        args.output.write_text("# SmolLM2 135M Instruct in 4 bits, from its GGUF file (`make bench-smollm2`)\n")
    for part in args.parts.split(","):
        lines = [
            *measure[part](),
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%F')}.",
        ]
        print("\n".join(lines), flush=True)
        if args.output is not None:
            write_section(args.output, lines)


def ids(args: argparse.Namespace) -> Iterator[str]:
    """transformers' conversion of the file leaves out that digits stand alone, so llama.cpp is the reference for those."""
    text = load_text(args.file, chat_template="auto", model_vocab_size=load_model_config(args.file).vocab_size)
    assert text.chat_template is not None
    theirs = AutoTokenizer.from_pretrained(args.file.parent, gguf_file=args.file.name)
    conversations = [[Message(role="user", content=question)] for question in QUESTIONS]
    conversations.append([Message(role="system", content="Be brief."), *conversations[0]])
    equal = with_digits = 0
    rendered, ours = [], []
    for conversation in conversations:
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = theirs(prompt, add_special_tokens=False)["input_ids"]
        found = list(text.chat_template.encode(conversation).token_ids)
        rendered.append(prompt)
        ours.append(found)
        if any(c.isdigit() for message in conversation for c in str(message.content)):
            with_digits += 1
        else:
            equal += found == expected
    plain = len(conversations) - with_digits
    yield "## Prompt ids"
    yield ""
    yield f"{equal} of {plain} conversations without digits have the ids of transformers' chat template."
    try:
        job = {"measure": "tokens", "model": str(args.file), "texts": rendered}
        tokens = llama(args, job)["tokens"]
        yield f"{sum(a == b for a, b in zip(ours, tokens, strict=True))} of {len(ours)} conversations have llama.cpp's ids."
    except MeasurementError as e:
        yield f"llama.cpp: {e}."


def answers(args: argparse.Namespace) -> Iterator[str]:
    """Greedy, of the same float32 weights. At each of our tokens transformers computes what it would have chosen there."""
    reference = load_reference(args.file)
    prompts = chat_prompts(args.file)
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, seed=0, temperature=0.0, ignore_eos=True)
    requests = [
        GenerateRequest(request_id=str(i), prompt_token_ids=p, sampling=sampling) for i, p in enumerate(prompts)
    ]
    yield f"## Greedy answers: {len(prompts)} questions, {ANSWER_TOKENS} tokens each, float32"
    yield ""
    yield f"| tensor parallel | tokens like transformers' | others, all where its two best are within {MARGIN} | others |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        for size in (1, 3):
            outputs = generate(
                EngineConfig(model_path=folder, model=load_model_config(folder), tensor_parallel_size=size), requests
            )
            same = near = wrong = 0
            for prompt, tokens in zip(prompts, outputs, strict=True):
                with torch.inference_mode():
                    logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
                top = logits.topk(2)
                for i, token in enumerate(tokens):
                    if token == top.indices[i, 0]:
                        same += 1
                    elif top.values[i, 0] - top.values[i, 1] <= MARGIN:
                        near += 1
                    else:
                        wrong += 1
            yield f"| {size} | {same} | {near} | {wrong} |"


def perplexity(args: argparse.Namespace) -> Iterator[str]:
    """Of a text of Python's documentation."""
    text = load_text(args.file, chat_template="auto", model_vocab_size=load_model_config(args.file).vocab_size)
    tokens = text.tokenizer.encode("\n".join(pydoc_data.topics.topics[name] for name in TOPICS))[:TEXT_TOKENS]
    assert len(tokens) == TEXT_TOKENS
    reference = load_reference(args.file)
    with torch.inference_mode():
        rows = reference(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(dim=-1)
    expected = float(rows.gather(1, torch.tensor(tokens[1:])[:, None]).mean())
    yield f"## Perplexity of {TEXT_TOKENS:,} tokens of English text"
    yield ""
    yield "| computed by | weights | perplexity | to transformers |"
    yield "|---|---|---|---|"

    def row(by: str, weights: str, mean: float) -> str:
        return f"| {by} | {weights} | {math.exp(-mean):.4f} | {100 * (math.exp(expected - mean) - 1):+.2f} % |"

    yield row("transformers, float32", "dequantised", expected)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        yield row("ours, float32", "dequantised", mean_logprob(Path(folder), tokens, dtype="float32"))
    for dtype in ("float32", "bfloat16"):
        yield row(f"ours, {dtype}", "Q4_1, kept", mean_logprob(args.file, tokens, dtype=dtype))
    try:
        found = llama(args, {"measure": "logprobs", "model": str(args.file), "sequences": [tokens]})
        yield row(f"llama.cpp{found['note']}", "Q4_1, kept", statistics.fmean(found["logprobs"][0]))
    except MeasurementError as e:
        yield f"| llama.cpp | | {e} | |"


def speed(args: argparse.Namespace) -> Iterator[str]:
    """Alternating, each in a process of its own."""
    ours = [str(Path(sys.executable)), str(RUNNERS / "ours.py")]
    job: dict[str, Any] = {"measure": "rates", "model": str(args.file), "batches": BATCHES, "repeats": 3}
    job |= {"prompt_tokens": 64, "output_tokens": 64, "vocab_size": load_model_config(args.file).vocab_size}
    subjects = {
        "ours, float32": lambda: run_job(ours, job | {"dtype": "float32"}, environment=os.environ),
        "ours, bfloat16": lambda: run_job(ours, job | {"dtype": "bfloat16"}, environment=os.environ),
        "llama.cpp": lambda: llama(args, job),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for name, run in subjects.items():
            try:
                found[name].append(run())
            except MeasurementError as e:
                failed[name] = str(e)
    columns = [f"decode@{batch}" for batch in BATCHES] + ["prefill_512"]
    yield f"## Speed: tokens/s, medians of {args.rounds} rounds"
    yield ""
    yield "| | one stream | 8 streams | prompt of 512 |"
    yield "|---|---|---|---|"
    for name, rounds in found.items():
        cells = (
            [f"{statistics.median(r[column] for r in rounds):,.0f}" for column in columns]
            if rounds
            else [failed[name], "", ""]
        )
        note = rounds[-1].get("note", "") if rounds else ""
        yield f"| {name}{note} | {' | '.join(cells)} |"
    yield ""
    yield "Random prompts of 64 tokens, 64 new ones; the time after every stream has its first token. All cores."


def load_reference(file: Path) -> LlamaForCausalLM:
    """transformers' model and configuration, with the weights that the `gguf` package reads."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return dequantized_model(file, LlamaForCausalLM(config))


def chat_prompts(file: Path) -> list[list[int]]:
    text = load_text(file, chat_template="auto", model_vocab_size=load_model_config(file).vocab_size)
    assert text.chat_template is not None
    conversations = [[Message(role="user", content=question)] for question in QUESTIONS]
    return [list(text.chat_template.encode(conversation).token_ids) for conversation in conversations]


def generate(config: EngineConfig, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """Outputs in the order of the requests. Ranks are threads of this process."""

    def program(tp: Any) -> list[list[int]] | None:
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        if tp.rank:
            run_follower(runner, tp)
            return None
        core = EngineCore(config, runner, tp)
        outputs = run_requests(core, requests)
        core.shutdown()
        return outputs

    outputs: list[list[int]] = run_ranks(config.tensor_parallel_size, program)[0]
    return outputs


def mean_logprob(model: Path, tokens: list[int], *, dtype: Any) -> float:
    engine = LLMEngine(EngineConfig(model_path=str(model), model=load_model_config(model), dtype=dtype))
    sampling = SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0)
    request = GenerateRequest(request_id="0", prompt_token_ids=tokens, sampling=sampling)
    values = [v for delta in engine.stream(request) for v in delta.prompt_logprobs or []]
    return statistics.fmean(value.logprob for value in values if value is not None)


def llama(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """`note` in the result: how it had to be run. Its AMX kernels crash on some virtual machines."""
    command = [str(args.llama_python), str(RUNNERS / "llama.py")]
    try:
        return run_job(command, job, environment=os.environ) | {"note": ""}
    except MeasurementError as e:
        if not str(e).startswith(f"status {-signal.SIGSEGV}"):
            raise
    found = run_job(command, job | {"extra_buffers": False}, environment=os.environ)
    return found | {"note": " (its AMX kernels crash here, so without them)"}


if __name__ == "__main__":
    main()
