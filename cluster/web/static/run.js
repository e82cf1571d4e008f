// One request from its first byte to its end: the text as it arrives, and timings.
// Knows the two formats of chunks, and responses in one piece. Knows no elements of the page.

import { streamJson } from "./api.js";

/**
 * Streams `body`; `onText(text)` for each piece, `onToolCall(delta)` for pieces of tool calls.
 * Returns {finishReason, adapter, usage, numPieces, firstTextS, totalS, textS}: finishReason is "stopped" after an abort; adapter is the
 * revision that answered, or null; seconds since the start, textS from the first piece to the last; firstTextS is null without any text.
 * Throws ApiError; `error.outcome` has the result so far.
 */
export async function run(path, body, { signal, onText, onToolCall }) {
  const startedAt = performance.now();
  const outcome = { finishReason: null, adapter: null, usage: null, numPieces: 0, firstTextS: null, textS: 0, totalS: 0 };
  const seconds = () => (performance.now() - startedAt) / 1000;
  try {
    const onHeaders = (headers) => (outcome.adapter = headers.get("X-Tramontane-Adapter"));
    for await (const event of streamJson(path, body, { signal, onHeaders })) {
      outcome.usage = event.usage ?? outcome.usage;
      const choice = event.choices?.find((c) => c.index === 0);
      if (!choice) continue;
      const said = choice.delta ?? choice.message ?? { content: choice.text };
      outcome.finishReason = choice.finish_reason ?? outcome.finishReason;
      said.tool_calls?.forEach((call, index) => onToolCall?.({ index, ...call })); // without streaming they have no index
      if (said.content || said.tool_calls) {
        outcome.firstTextS ??= seconds();
        outcome.textS = seconds() - outcome.firstTextS;
        outcome.numPieces += 1;
      }
      if (said.content) onText(said.content);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      outcome.totalS = seconds();
      error.outcome = outcome;
      throw error;
    }
    outcome.finishReason = "stopped";
  }
  outcome.totalS = seconds();
  return outcome;
}

/** Tokens per second after the first token, or null if there are too few. */
export function speed({ usage, numPieces, textS }) {
  const count = usage?.completion_tokens ?? numPieces;
  return count > 1 && textS > 0 ? (count - 1) / textS : null;
}
