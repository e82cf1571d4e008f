"""Fields that other servers or OpenAI's API have and that cannot act here: what each means, and when it is refused.

A field that would change the answer is refused, unless its value asks for nothing. The others are accepted and named in the response's
header, as unknown fields are. /openapi.json describes all of them. Knows no values of requests; lenient.py applies the tables.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.api.schemas.base import StreamOptions
from cluster.api.schemas.chat import (
    AssistantMessage,
    ChatRequest,
    DeveloperMessage,
    InputTextPart,
    NamedToolChoice,
    OutputTextPart,
    RefusalPart,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from cluster.api.schemas.completions import CompletionRequest
from cluster.api.schemas.embeddings import EmbeddingRequest
from cluster.api.schemas.messages.request import (
    MessagePrompt,
    MessageRequest,
    MessageTool,
    TextBlockInput,
    ToolResultBlockInput,
    ToolUseBlockInput,
)
from cluster.api.schemas.responses.request import (
    InputFunctionCall,
    InputFunctionOutput,
    InputMessage,
    ResponseInput,
    ResponseRequest,
)
from cluster.api.schemas.structured import StructuredOutputs


@dataclass(frozen=True, slots=True)
class Foreign:
    """`meaning`: for the documentation. `neutral`: the values that ask for nothing; any other is refused. None: every value is accepted."""

    meaning: str
    neutral: tuple[Any, ...] | None = None

    def refuses(self, value: Any) -> bool:
        """Whether this value asks for something that this server cannot do."""
        return self.neutral is not None and not is_one_of(value, self.neutral)


def is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    """As JSON compares: 0 is not false, and 1.0 is 1."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in known)


_Table = dict[str, Foreign]


def _no_effect(names: str, meaning: str) -> _Table:
    """names: with spaces between them."""
    return {name: Foreign(meaning) for name in names.split()}


def _refused(names: str, meaning: str, *, neutral: tuple[Any, ...] = (None,)) -> _Table:
    return {name: Foreign(meaning, neutral) for name in names.split()}


_OFF = (None, False)
_CACHE_MARK = "Anthropic's mark for its prompt cache. The prefix cache here needs none."
_NO_BACKEND = "A setting of vLLM's backends, which this server does not have."

_GENERATION: _Table = {
    **_no_effect("metadata store", "OpenAI stores it with the response. This server stores no responses."),
    **_no_effect("service_tier", "OpenAI's choice of a price class. This server has one."),
    **_no_effect(
        "prompt_cache_key prompt_cache_retention prompt_cache_options",
        "A hint for OpenAI's prompt cache. The one here needs none.",
    ),
    **_no_effect("safety_identifier", "The end user, for OpenAI's abuse detection. `user` is written to the log."),
    **_no_effect("num_ctx keep_alive options", "Ollama's settings of the loaded model, which a request cannot change."),
    **_no_effect("typical_p tfs_z mirostat mirostat_tau mirostat_eta", "A sampling method that only llama.cpp has."),
    **_no_effect("repeat_penalty repeat_last_n", "llama.cpp's penalty. `repetition_penalty` acts."),
    **_no_effect("cache_prompt id_slot", "A setting of llama.cpp's prompt cache."),
    **_no_effect(
        "spaces_between_special_tokens", "Special tokens are shown without spaces, as by fast tokenizers in vLLM."
    ),
    **_no_effect("guided_decoding_backend kv_transfer_params vllm_xargs cache_salt", _NO_BACKEND),
    **_no_effect("length_penalty early_stopping", "It acts in beam search only, which is not supported."),
    **_refused("use_beam_search", "Beam search is not supported.", neutral=_OFF),
    **_refused("logits_processors", "Functions that run in the engine are not supported.", neutral=(None, [])),
    **_refused("return_tokens_as_token_ids", "Tokens are shown as text; `return_token_ids` adds ids.", neutral=_OFF),
    **_refused("truncation_side", "`truncate_prompt_tokens` keeps the end of the prompt.", neutral=(None, "left")),
    **_refused("guided_whitespace_pattern", "The white space in JSON is fixed."),
    **_refused("structural_tag", "Send `structured_outputs` or `tools`."),
    **_refused("grammar json_schema regex ebnf", "Send `structured_outputs`.", neutral=(None, "")),
}
_COMPLETION: _Table = {**_GENERATION, **_refused("prompt_embeds", "Prompts are text or token ids.")}
_CHAT: _Table = {
    **_GENERATION,
    **_no_effect(
        "reasoning_effort reasoning thinking include_reasoning enable_thinking prompt_mode",
        "A setting of reasoning models.",
    ),
    **_no_effect("verbosity", "A setting of OpenAI's models for the length of an answer."),
    **_no_effect("prediction", "Known parts of an answer, which OpenAI uses to be faster. The answer is the same."),
    **_no_effect("add_special_tokens", "The chat template writes the special tokens."),
    **_refused("echo", "The answer never repeats the conversation.", neutral=_OFF),
    **_refused("best_of", "Chat returns all `n` answers.", neutral=(None, 1)),
    **_refused("functions", "Send `tools`.", neutral=(None, [])),
    **_refused("function_call", "Send `tool_choice`.", neutral=(None, "none", "auto")),
    **_refused("modalities", "The model answers with text only.", neutral=(None, [], ["text"])),
    **_refused("audio", "The model answers with text only."),
    **_refused("moderation guardrails", "Use /v1/moderations.", neutral=(None, [])),
    **_refused("web_search_options", "The server cannot search the web."),
    **_refused("chat_template", "The template is the server's; an operator sets it with --chat-template."),
    **_refused("top_prompt_logprobs", "Send `prompt_logprobs`.", neutral=(None, 0)),
    **_refused("documents", "Put the documents into a message.", neutral=(None, [])),
}
_MESSAGE: _Table = {
    **_no_effect(
        "id timestamp provider_specific_fields parsed annotations",
        "Another server's or a client's own data about the message.",
    ),
    **_no_effect(
        "reasoning_content reasoning thinking_blocks",
        "The thoughts of a reasoning model, which are not part of the conversation.",
    ),
    **_no_effect("cache_control", _CACHE_MARK),
    **_refused("images", "The model reads text only.", neutral=(None, [])),
}
_PART: _Table = {
    **_no_effect("cache_control", _CACHE_MARK),
    **_no_effect("annotations logprobs", "What a server told about its own text, which is an input here."),
}
_FUNCTION_ONLY: _Table = _refused("type", "Only tools of type 'function' are supported.", neutral=(None, "function"))

_RESPONSE_INPUT: _Table = {
    **_refused("conversation", "Send `previous_response_id`, or the whole conversation as `input`."),
    **_refused("prompt", "The server has no prompt templates. Send `instructions` and `input`."),
    **_refused("context_management", "Send `truncation`.", neutral=(None, [])),
    **_no_effect("prompt_cache_key prompt_cache_retention prompt_cache_options", "A hint for OpenAI's prompt cache."),
    **_no_effect("service_tier safety_identifier", "OpenAI's choice of a price class, or of an end user's name."),
}
_RESPONSE: _Table = {
    **_RESPONSE_INPUT,
    **_refused("moderation", "Use /v1/moderations."),
    **_refused("image", "The model answers with text only."),
    **_no_effect("max_tool_calls", "A limit of OpenAI's built-in tools, which this server does not have."),
    **_no_effect("background_options access_programs", "A price class or an offer of OpenAI's."),
    **_refused("n", "A response has one output.", neutral=(None, 1)),
    **_refused("max_tokens max_completion_tokens", "It is chat's name. Send `max_output_tokens`."),
    **_refused("response_format structured_outputs", "It is chat's name. Send `text`, with `format`."),
    **_refused("logprobs", "It is chat's name. Send `top_logprobs` and `include`.", neutral=_OFF),
}
_ITEM: _Table = _no_effect("created_by caller namespace async", "Another server's own data about the item.")

_BLOCK: _Table = {
    **_no_effect("cache_control", _CACHE_MARK),
    **_no_effect("citations caller toolset_name", "Another server's own data about the block."),
}
_MESSAGE_PROMPT: _Table = {
    **_no_effect("cache_control diagnostics", _CACHE_MARK),
    **_refused("mcp_servers", "The server calls no other servers.", neutral=(None, [])),
    **_refused("container", "The server runs no code and keeps no state."),
    **_refused("output_format", "It is an earlier name. Send `output_config`, with `format`."),
    **_refused("response_format structured_outputs", "It is chat's name. Send `output_config`, with `format`."),
    **_no_effect("context_management", "What Anthropic's service leaves out of a conversation that grows long."),
    **_refused("compaction", "The server summarizes no conversations. Send a message that asks for a summary."),
    **_no_effect("betas speed inference_geo user_profile_id workspace_id", "A setting of Anthropic's service."),
    **_no_effect("billing_policy fallbacks fallback_credit_token", "A setting of Anthropic's service."),
}

FOREIGN: dict[type[msgspec.Struct], _Table] = {
    MessagePrompt: _MESSAGE_PROMPT,
    MessageRequest: {
        **_MESSAGE_PROMPT,
        **_no_effect("service_tier", "Anthropic's choice of a price class."),
        **_refused("stop", "It is chat's name. Send `stop_sequences`.", neutral=(None, [])),
    },
    MessageTool: _no_effect(
        "cache_control allowed_callers defer_loading eager_input_streaming input_examples",
        "A setting of Anthropic's own tools.",
    ),
    TextBlockInput: _BLOCK,
    ToolUseBlockInput: _BLOCK,
    ToolResultBlockInput: {
        **_BLOCK,
        **_no_effect("is_error", "The chat template has no place for it. The result's text says what went wrong."),
    },
    ResponseInput: _RESPONSE_INPUT,
    ResponseRequest: _RESPONSE,
    InputMessage: _ITEM,
    InputFunctionCall: _ITEM,
    InputFunctionOutput: _ITEM,
    CompletionRequest: _COMPLETION,
    ChatRequest: _CHAT,
    EmbeddingRequest: _no_effect("input_type metadata", "A description of the input, which the model does not read."),
    StreamOptions: _no_effect("include_obfuscation", "OpenAI's padding of chunks against eavesdroppers."),
    StructuredOutputs: {
        **_no_effect("disable_fallback", _NO_BACKEND),
        **_refused("whitespace_pattern", "The white space in JSON is fixed."),
        **_refused("disable_any_whitespace", "The white space in JSON is fixed.", neutral=_OFF),
        **_refused("disable_additional_properties", "Write it into the schema.", neutral=_OFF),
        **_refused("structural_tag", "Send `tools`."),
    },
    SystemMessage: _MESSAGE,
    DeveloperMessage: _MESSAGE,
    UserMessage: _MESSAGE,
    ToolMessage: _MESSAGE,
    AssistantMessage: {
        **_MESSAGE,
        **_refused("audio", "The model reads text only.", neutral=(None, {})),
        **_refused("function_call", "Send `tool_calls`.", neutral=(None, {})),
    },
    TextPart: _PART,
    InputTextPart: _PART,
    OutputTextPart: _PART,
    RefusalPart: _PART,
    Tool: {**_PART, **_FUNCTION_ONLY},
    ToolCall: _FUNCTION_ONLY,
    NamedToolChoice: _FUNCTION_ONLY,
}
