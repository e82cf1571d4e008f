"""The wire format between gateway and rank 0: requests and aborts in, one frame per engine step out.

Knows no torch, no text and no transport. Both ends encode with msgspec's MessagePack; a frame on the socket is a 4-byte
big-endian length and that many bytes. Unknown fields are ignored, so gateway and replica may differ by a version.
"""

import enum
import hashlib
from array import array
from collections.abc import Sequence
from typing import Annotated

import msgspec

PROTOCOL_VERSION = 3

# From this priority on a request is background work: lines of batches, which use what online requests leave. Smaller runs first.
BATCH_PRIORITY = 1_000_000


class FinishReason(enum.StrEnum):
    """Why a request ended. STOP: eos or a stop token id. LENGTH: max_tokens or the model's context. ERROR: see `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. The engine checks the bounds when a request arrives, see `workers.engine.scheduling.request`.

    `seed` is always present: with it, sampling is a pure function of (logits, parameters, seed, position), where
    position is the index of the output token. temperature 0 is greedy. top_k 0 and min_p 0.0 are off.
    `logprobs`: None for none, n for the chosen token's log-probability and those of the n most likely tokens (0 is allowed).
    `prompt_logprobs`: the same for the prompt's tokens, from index `prompt_logprobs_start` on; index 0 never has one.
    `max_tokens` 0 computes the prompt only: for its log-probabilities, or for an embedding.
    `allowed_token_ids`: None for all. `bad_words`: token sequences that the output must not complete.
    `grammar`: an llguidance grammar that the whole output follows; it ends where the grammar ends.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=0)]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to extend.

    `output_token_ids`: tokens that another replica generated before; sampling continues after them.
    `embed`: return the mean of the prompt's last hidden states; `max_tokens` is 0 then.
    `adapter`: the revision of the adapter to apply, such as "support@1f0c63d2a9b4"; None for the base model.
    `traceparent`: the span that the replica's spans belong to, as W3C's Trace Context writes it; None for a request that is not traced.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = []
    priority: int = 0  # smaller runs first, as in vLLM; from BATCH_PRIORITY on it is background work
    embed: bool = False
    adapter: str | None = None
    traceparent: str | None = None

    @property
    def is_background(self) -> bool:
        return self.priority >= BATCH_PRIORITY


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log-probabilities (nats) under the model's own distribution, before temperature and penalties."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: list[tuple[int, float]] = []  # (token id, logprob), most likely first


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one engine step adds to one request.

    `token_ids` includes the token that ended it; `stop_token_id` repeats that one when finish_reason is STOP, so that
    the gateway leaves it out of the text. `num_cached_tokens` (prompt tokens found in the prefix cache) comes with
    the first delta, and so do `prompt_logprobs` (one for each prompt token from `prompt_logprobs_start` on, None for index 0),
    unless the request had output already. `embedding`: hidden_size little-endian float32 values, in a request's only delta.
    `error` is a message for the user when finish_reason is ERROR. `refused`: the request itself is the cause, and every replica would
    refuse it. `elsewhere`: this replica alone is the cause, and another one may go on.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: bytes | None = None
    error: str | None = None
    refused: bool = False
    elsewhere: bool = False


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """The replica's state after a step. Counts named `_total` only grow. Times are seconds.

    Counts named `background` are parts of those without it: background requests delay only each other.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pending_tokens: int = 0  # still to be computed before every request, running or waiting, has its next token
    num_background: int = 0  # running and waiting
    num_background_pending_tokens: int = 0
    num_background_blocks: int = 0  # used by background requests alone; a lower bound
    tokens_per_s: float = 0.0  # recent speed of steps that computed prompts; 0 before the first
    num_blocks: int = 0  # usable KV blocks, the null block not counted
    num_used_blocks: int = 0  # held by running requests; cached but unreferenced blocks count as free
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    prefix_queries_total: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits_total: int = 0  # of those, found
    background_prefix_queries_total: int = 0
    background_prefix_hits_total: int = 0
    last_step_s: float = 0.0
    step_s_total: float = 0.0
    step_age_s: float | None = None  # of the step now running; None between steps
    forward_age_s: float | None = None  # since the last forward pass on all ranks; None before the first
    stuck_ranks: tuple[int, ...] = ()  # ranks the running step waits for, once it takes suspiciously long


class CacheEvents(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the prefix cache changed, as hashes of blocks (`hash_block`). Apply them in this order: reset, evicted, stored.

    reset: forget everything known before; `stored` is then the whole cache. The first frame of a connection sets it.
    """

    stored: list[bytes] = []
    evicted: list[bytes] = []
    reset: bool = False


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Gateway to rank 0, the first frame: proves the caller knows the replica's secret."""

    token: str
    version: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Forget this request. Unknown ids are ignored: the request may have ended a moment ago."""

    request_id: str


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Either way, whenever nothing else was sent for HEARTBEAT_INTERVAL_S."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, tag="facts"):
    """Rank 0's answer to Hello: what start-up found out, and the limits against which the gateway checks requests."""

    replica_id: str
    tensor_parallel_size: int
    vocab_size: int
    max_model_len: int  # prompt and output together, tokens
    max_num_seqs: int
    block_size: int  # tokens per KV block
    num_blocks: int
    sliding_window: int | None  # the widest of all layers
    enable_prefix_caching: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    attention_backend: str
    hidden_size: int = 0
    device: str = ""  # for people
    max_num_batched_tokens: int = 0  # of one step; 0 from an older replica
    max_background_tokens: int = 0
    dtype: str = ""  # see EngineConfig; empty from an older replica
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    kv_token_bytes: int = 0  # on one rank; 0 from an older replica
    # Of what the kernels compute: replicas with the same one give the same logits to the last bit. Empty where it is not known.
    numerics: str = ""
    version: int = PROTOCOL_VERSION


class StepFrame(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Rank 0 to gateway, after a step that produced something and as rank 0's heartbeat: deltas may be empty."""

    deltas: list[TokenDelta]
    load: LoadReport
    cache: CacheEvents | None = None


class Ending(msgspec.Struct, frozen=True, kw_only=True, tag="ending"):
    """Rank 0 to gateway, the last frame before it closes every connection: the replica has ended. `reason` is for people.

    crashed: the requests it worked on may be the cause; False when it was stopped, or a rank froze or lost its connection.
    """

    reason: str
    crashed: bool = True


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """Rank 0 to gateway: it rejects this connection (wrong token or version) and closes it."""

    reason: str


ToReplica = Hello | Submit | Abort | Heartbeat
FromReplica = EngineFacts | StepFrame | Ending | Refused

HEARTBEAT_INTERVAL_S = 0.5
SILENCE_IS_DEATH_S = 3.0
LOADING_SILENCE_S = 60.0  # the same for a rank that starts
MAX_FRAME_BYTES = 64 * 1024 * 1024

FRAME_HEADER_BYTES = 4
_encoder = msgspec.msgpack.Encoder()


def root_hash(adapter: str | None) -> bytes:
    """The `parent` of a sequence's first block: the same tokens have other keys and values under another adapter."""
    # `person` keeps these hashes apart from those of blocks.
    return b"" if adapter is None else hashlib.blake2b(adapter.encode(), digest_size=16, person=b"adapter").digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full KV block's content: these tokens after everything that `parent` stands for.

    `parent` is the hash of the block before, or `root_hash` for the first one. Both ends compute it: the replica for what it caches,
    the gateway for what a prompt could find there.
    """
    return hashlib.blake2b(array("i", token_ids).tobytes(), key=parent, digest_size=16).digest()


def encode_frame(message: ToReplica | FromReplica) -> bytes:
    """The length prefix and the message, ready for the socket."""
    body = _encoder.encode(message)
    return len(body).to_bytes(FRAME_HEADER_BYTES, "big") + body


def frame_length(header: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """How many bytes follow this header. Raises ValueError when a peer announces more than `max_bytes`."""
    length = int.from_bytes(header, "big")
    if length > max_bytes:
        raise ValueError(f"a frame of {length} bytes was announced; at most {max_bytes} are allowed")
    return length
