// Requests to this server with the user's key, and its errors.
// Knows the error format and Bearer authentication. Knows no view.

import { askForKey, authorization, currentKey } from "./key.js";
import { eventsOf } from "./sse.js";

/** `status` is null without a response. `retryAfterS`: seconds from the Retry-After header, or null. */
export class ApiError extends Error {
  constructor(message, { status = null, param = null, code = null, retryAfterS = null } = {}) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { status, param, code, retryAfterS });
  }
}

/** The response to a request, with any status. After a 401 the user is asked for a key first, unless quiet. */
export async function send(path, { quiet = false, headers = {}, ...options } = {}) {
  for (;;) {
    const key = currentKey();
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...headers, ...authorization(key) } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not respond. Check that it is running.");
    }
    if (response.status !== 401) return response;
    const refusal = await errorOf(response);
    if (key !== currentKey()) continue; // the user has entered a key in the meantime
    if (quiet || !(await askForKey(key === null ? null : "The server does not accept this key."))) throw refusal;
  }
}

/** A JSON response. Throws ApiError. */
export async function getJson(path, options) {
  const response = await send(path, options);
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/**
 * The parsed events of a streamed response to `body`. `onHeaders(headers)` before the first.
 * Throws ApiError, also for an error event in mid-stream.
 */
export async function* streamJson(path, body, { signal, onHeaders }) {
  const response = await send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  onHeaders(response.headers);
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
    yield await response.json(); // the user requested a response in one piece
    return;
  }
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, event.error);
      yield event;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the response was complete.");
  }
  throw new ApiError("The stream ended before the response was complete.");
}

async function errorOf(response) {
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  const { status } = response;
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...error, status, retryAfterS });
  } catch {
    return new ApiError(`The server answered ${status} ${response.statusText}.`, { status, retryAfterS });
  }
}
