"""What `serve` says when it is ready: addresses, each model's engine and text, and the commands to try next. Knows no Ray."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.cluster import ClusterConfig
from cluster.config.sampling_defaults import NO_DEFAULTS
from cluster.config.serve import API_KEY_ENV, ServeConfig
from cluster.profile.file import ProfileFile
from cluster.text.load import LoadedText
from workers.config import describe_dtype
from workers.protocol import EngineFacts


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known once requests are served. `facts`: of each model, None until one of its replicas has reported them.

    `token_path`: where the dashboard's token can be read, when it is in a file.
    """

    urls: Sequence[str]
    elapsed_s: float
    facts: Sequence[EngineFacts | None]
    texts: Sequence[LoadedText]
    dashboard_url: str | None
    token_path: Path | None
    profile: ProfileFile | None


def banner(config: ClusterConfig, ready: Ready) -> str:
    server = config.server
    url, *others = ready.urls
    body = json.dumps({"model": server.model_name, "prompt": "def fibonacci(n):", "max_tokens": 64})
    lines = [
        "",
        f"Ready in {ready.elapsed_s:.1f} s.",
        f"  Endpoint   {url}/v1",
        *(f"             {other}/v1" for other in others),
        *(
            line
            for one, facts, text in zip(config.deployments, ready.facts, ready.texts, strict=True)
            for line in _model_lines(one, facts, text, is_named=len(config.deployments) > 1)
        ),
        *([f"  Platform   {server.platform}"] if server.platform is not None else []),
        f"  Try        curl {url}/v1/completions{_key(server)} -H 'Content-Type: application/json' -d '{body}'",
        f"  Open       {url}/ in a browser for the playground and a live view of the cluster; {url}/docs for the API",
        f"  Watch      tramontane status --url {url}",
    ]
    if server.tracing is not None:
        lines.append(f"  Traces     to {server.tracing.shown_url}")
    if ready.profile is not None:
        num_steps, path = ready.profile.num_steps, ready.profile.path
        lines.append(f"  Profile    the next {num_steps} steps with requests are recorded and written to {path}")
    if ready.dashboard_url:
        token = f" (its token is in {ready.token_path})" if ready.token_path else ""
        lines.append(f"  Dashboard  {ready.dashboard_url}{token}")
    return "\n".join([*lines, "  Stop       Ctrl-C", ""])


def _model_lines(config: ServeConfig, facts: EngineFacts | None, text: LoadedText, *, is_named: bool) -> Iterator[str]:
    if is_named:
        low, high = config.min_replicas, config.max_replicas
        replicas = f"{high} replica{'s' * (high != 1)}" if low == high else f"{low} to {high} replicas"
        yield f"  Model      {config.model_name}, {replicas}"
    yield f"  Engine     {engine_line(facts)}"
    if config.engine.model.has_vision:
        yield "  Images     not read: the checkpoint's encoder of images is left out"
    if adapters := ", ".join(name for name, _ in config.lora):
        yield f"  Adapters   {adapters}"
    yield f"  Tokenizer  {text.tokenizer.description}"
    yield f"  Template   {text.choice if text.chat_template is not None else f'WARNING: {text.choice}'}"
    if sampling := sampling_line(config):
        yield f"  Sampling   {sampling}"


def _key(server: ServeConfig) -> str:
    """The key itself is never printed. Where the environment holds it, the command can be pasted as it is."""
    if not server.has_keys:
        return ""
    is_in_environment = server.api_key is not None and os.environ.get(API_KEY_ENV) == server.api_key
    return f' -H "Authorization: Bearer {f"${API_KEY_ENV}" if is_in_environment else "YOUR_KEY"}"'


def engine_line(facts: EngineFacts | None) -> str:
    """The sizes that the first replica runs with; "unknown" until one has reported."""
    if facts is None:
        return "unknown until a replica runs"
    numbers = f"{describe_dtype(facts.dtype, facts.quantization)}; " if facts.dtype else ""
    return (
        f"{facts.device or 'unknown device'}: up to {facts.max_num_seqs:,} sequences and {facts.max_num_batched_tokens:,} tokens a step "
        f"(batches: {facts.max_background_tokens:,} beside other requests); {facts.num_blocks:,} KV blocks of {facts.block_size} tokens"
        f"{_kv_form(facts)}; {numbers}attention {facts.attention_backend}"
    )


def _kv_form(facts: EngineFacts) -> str:
    """ " in int8, 66 KiB per token and rank": what --kv-cache-dtype changes."""
    form = "" if facts.kv_cache_dtype == "auto" else f" in {facts.kv_cache_dtype}"
    ranks = "" if facts.tensor_parallel_size == 1 else " and rank"
    return f"{form}, {facts.kv_token_bytes / 1024:.3g} KiB per token{ranks}" if facts.kv_token_bytes else form


def sampling_line(config: ServeConfig) -> str:
    """What the model's makers chose for requests that leave it out, and from where; "" if nothing."""
    if config.sampling_defaults == NO_DEFAULTS:
        return ""
    own = "the GGUF file" if config.engine.model_path.endswith(".gguf") else "the checkpoint's generation_config.json"
    where = own if config.generation_config == "auto" else f"{config.generation_config}/generation_config.json"
    return f"{config.sampling_defaults} where a request says nothing, from {where}"
