"""What constrained decoding costs, and whether its outputs conform.

    python benchmarks/constrained.py [MODEL_FOLDER] [--batches 1,8,32] [--schemas 100] [--output benchmarks/results/constrained.md]

The gateway's own compiler makes the grammars. The engine computes a mask on another thread while the model computes its logits.
So tokens per second are the cost for a user, and the time of a mask is the cost for the machine.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import jsonschema  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from support.clients.random_schemas import random_schema  # noqa: E402

from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput  # noqa: E402
from cluster.text.output.output_text import OutputText  # noqa: E402
from cluster.text.tokenizer import Tokenizer, load_tokenizer, open_tokenizer  # noqa: E402
from workers.checkpoint.model_config import load_model_config  # noqa: E402
from workers.config import EngineConfig  # noqa: E402
from workers.engine.llm_engine import LLMEngine, stream_requests  # noqa: E402
from workers.protocol import FinishReason, GenerateRequest, SamplingParams  # noqa: E402
from workers.sampling.vocabulary import load_grammar_tokenizer, new_matcher  # noqa: E402

V3 = Path(str(files("mistral_common"))) / "data" / "mistral_instruct_tokenizer_240323.model.v3"
OUTPUT_TOKENS = 48
# Long enough that no output ends before OUTPUT_TOKENS.
KINDS: dict[str, StructuredOutput | None] = {
    "free": None,
    "JSON schema": StructuredOutput(
        "json",
        {
            "type": "array",
            "minItems": 200,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 20},
                    "age": {"type": "integer", "minimum": 0, "maximum": 130},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
                },
                "required": ["name", "age", "tags"],
                "additionalProperties": False,
            },
        },
    ),
    "regex": StructuredOutput("regex", r"([A-Z][a-z]{1,12} [0-9]{2,5}; ){200}"),
    "choice": StructuredOutput("choice", [f"{i} " + "first second third " * 20 for i in range(100)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "demo_model"))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch; by default one for each core")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    description = machine.describe(torch.device(args.device))
    tokenizer, config = load_tokenizer(args.model), load_model_config(args.model)
    compiler = GrammarCompiler(tokenizer, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    batches = [int(b) for b in args.batches.split(",")]
    engine = LLMEngine(
        EngineConfig(
            model_path=args.model,
            tokenizer_path=str(tokenizer.path),
            model=config,
            device=args.device,
            dtype="float32" if args.device == "cpu" else "bfloat16",
            max_num_seqs=max(batches),
            max_model_len=2048,
            enable_prefix_caching=False,
            num_threads=args.threads,
        )
    )
    lines = [
        f"# Constrained decoding: {Path(args.model).name}",
        "",
        f"{description}. `make bench`, {time.strftime('%F')}.",
        "",
        *speed_table(engine, tokenizer, compiler, batches),
        "",
        *mask_table(tokenizer),
        "",
        *validity(engine, tokenizer, compiler, args.schemas),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        args.output.write_text(table)


def request(name: str, tokenizer: Tokenizer, grammar: str | None, **params: Any) -> GenerateRequest:
    """A request that answers a question, as in a chat: `at_start` applies to its grammar."""
    sampling = SamplingParams(**({"temperature": 1.0, "grammar": grammar} | params))
    return GenerateRequest(request_id=name, prompt_token_ids=tokenizer.encode("data = "), sampling=sampling)


def speed_table(engine: LLMEngine, tokenizer: Tokenizer, compiler: GrammarCompiler, batches: list[int]) -> list[str]:
    grammars = {
        kind: None if output is None else compiler.compile(output, at_start=True, param="structured_outputs")
        for kind, output in KINDS.items()
    }
    found: dict[tuple[str, int], float] = {}
    for batch in batches:
        for repeat in range(3):  # in turns, so that other work on the machine affects all; the first warms up
            for kind, grammar in grammars.items():
                rate = decode_rate(engine, tokenizer, grammar, batch)
                if repeat:
                    found[kind, batch] = max(rate, found.get((kind, batch), 0.0))
    lines = [
        f"Tokens per second with temperature 1, {OUTPUT_TOKENS} tokens each, the better of 2 runs (share of free decoding).",
        "",
        "| batch | " + " | ".join(KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
    ]
    for batch in batches:
        free = found["free", batch]
        cells = [
            f"{found[k, batch]:,.0f} ({found[k, batch] / free:.0%})" if k != "free" else f"{free:,.0f}" for k in KINDS
        ]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return lines


def decode_rate(engine: LLMEngine, tokenizer: Tokenizer, grammar: str | None, batch: int) -> float:
    """Output tokens per second after every request has its first one, which waits for its grammar and its prompt."""
    core = engine.core
    for i in range(batch):
        params = {"max_tokens": OUTPUT_TOKENS, "seed": i, "ignore_eos": grammar is None}
        core.add_request(request(str(i), tokenizer, grammar, **params))
    started: set[str] = set()
    while len(started) < batch:
        started |= {delta.request_id for delta in core.step()}
    num_tokens, began = 0, time.perf_counter()
    while core.has_work():
        num_tokens += sum(len(delta.token_ids) for delta in core.step())
    return num_tokens / (time.perf_counter() - began)


def mask_table(tokenizer: Tokenizer) -> list[str]:
    lines = [
        "One matcher alone: the time of a mask, of accepting a token, and of compiling, along a random text of the grammar.",
        "",
        "| vocabulary | grammar | mask p50 | mask p99 | token p50 | token p99 | compile |",
        "|---|---|---|---|---|---|---|",
    ]
    outputs = {kind: output for kind, output in KINDS.items() if output is not None}
    outputs |= {"any JSON object": StructuredOutput("json_object", None)}
    outputs |= {f"{n} properties": StructuredOutput("json", wide_schema(n)) for n in (10, 100)}
    for path in (tokenizer.path, V3):
        vocabulary = open_tokenizer(path, "v3")
        size, eos = vocabulary.vocab_size, [vocabulary.eos_token_id]
        compiler = GrammarCompiler(vocabulary, vocab_size=size, eos_token_ids=eos)
        llguidance = load_grammar_tokenizer(path, vocab_size=size, eos_token_ids=eos)
        for kind, output in outputs.items():
            grammar = compiler.compile(output, at_start=True, param="structured_outputs")
            compiling = min(timed(new_matcher, llguidance, grammar) for _ in range(5))
            masks, takes = walk(llguidance, grammar, eos[0])
            cells = [f"{q:,.0f} us" for times in (masks, takes) for q in quantiles(times)]
            lines.append(f"| {size:,} | {kind} | {' | '.join(cells)} | {compiling * 1e3:.1f} ms |")
    return lines


def walk(llguidance: Any, grammar: str, eos: int, num_tokens: int = 500) -> tuple[list[float], list[float]]:
    """Seconds of each mask and of each accepted token, along random texts."""
    rng = random.Random(0)
    masks: list[float] = []
    takes: list[float] = []
    while len(masks) < num_tokens:
        matcher = new_matcher(llguidance, grammar)
        while not matcher.is_stopped() and len(masks) < num_tokens:
            began = time.perf_counter()
            mask = matcher.compute_bitmask()
            masks.append(time.perf_counter() - began)
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little"))
            token = int(rng.choice(allowed[allowed != eos] if len(allowed) > 1 else allowed))
            takes.append(timed(matcher.consume_token, token))
            assert not matcher.is_error(), matcher.get_error()
    return masks, takes


def wide_schema(num_properties: int) -> dict[str, Any]:
    properties = {f"property_{i}": {"type": ("string", "integer", "boolean")[i % 3]} for i in range(num_properties)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def validity(engine: LLMEngine, tokenizer: Tokenizer, compiler: GrammarCompiler, num_schemas: int) -> list[str]:
    schemas = {str(seed): random_schema(seed) for seed in range(num_schemas)}
    grammars, compiling = {}, []
    for name, schema in schemas.items():
        began = time.perf_counter()
        grammars[name] = compiler.compile(StructuredOutput("json", schema), at_start=True, param="response_format")
        compiling.append(time.perf_counter() - began)
    requests = [
        request(name, tokenizer, grammar, seed=int(name), max_tokens=1500) for name, grammar in grammars.items()
    ]
    outputs = {name: OutputText(tokenizer) for name in schemas}
    texts = dict.fromkeys(schemas, "")
    num_tokens, began = 0, time.perf_counter()
    for delta in stream_requests(engine.core, requests):
        texts[delta.request_id] += outputs[delta.request_id].push(delta).text
        num_tokens += len(delta.token_ids)
    took = time.perf_counter() - began
    valid = [
        n for n, text in texts.items() if outputs[n].finish_reason is FinishReason.STOP and conforms(text, schemas[n])
    ]
    wrong = sorted(set(schemas) - set(valid), key=int)
    return [
        f"{num_schemas} random schemas (`tests/support/clients/random_schemas.py`), one document each at temperature 1, "
        f"{num_tokens:,} tokens in {took:.1f} s: **{len(valid) / num_schemas:.0%} valid** by `jsonschema`"
        f"{f'; not schemas {wrong}' if wrong else ''}.",
        f"The gateway checks such a schema and compiles its grammar in {statistics.median(compiling) * 1e3:.1f} ms (median), "
        f"{max(compiling) * 1e3:.1f} ms (longest).",
    ]


def conforms(text: str, schema: dict[str, Any]) -> bool:
    # The checker of this draft: the one without a draft accepts times as in draft 3, without the zone that RFC 3339 requires.
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker)
    except (ValueError, jsonschema.ValidationError) as e:
        print(f"{e}\n{text}", file=sys.stderr)
        return False
    return True


def timed(action: Callable[..., object], *args: object) -> float:
    began = time.perf_counter()
    action(*args)
    return time.perf_counter() - began


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99 in microseconds."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e6, ordered[int(len(ordered) * 0.99)] * 1e6


if __name__ == "__main__":
    main()
