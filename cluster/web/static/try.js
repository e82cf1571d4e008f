// A form that sends one operation's request with the user's key and shows the response as it arrives.
// Knows how parameters go into an address. The starting values below make the first try useful.

import { getJson, send } from "./api.js";
import { make } from "./dom.js";

const STARTS = {
  "/v1/completions": { prompt: "def fibonacci(n):", max_tokens: 48 },
  "/v1/chat/completions": { messages: [{ role: "user", content: "Hello!" }], max_tokens: 48 },
  "/v1/embeddings": { input: "The wind is from the north." },
  "/v1/moderations": { input: "The wind is from the north." },
  "/tokenize": { prompt: "The wind is from the north." },
  "/detokenize": { tokens: [1, 2, 3] },
};
const MAX_SHOWN_CHARS = 100_000;

/** entry: {path, method, operation}. body: an example; undefined for operations without a body. */
export function makeTry({ path, method, operation }, body) {
  const parameters = (operation.parameters ?? []).map((parameter) => ({ ...parameter, input: make("input", { required: parameter.required }) }));
  const area = body && make("textarea", { class: "code", spellcheck: "false", "aria-label": "Body" });
  const answer = make("pre", { class: "code answer-text", tabindex: 0, "aria-label": "Response", hidden: true });
  const status = make("p", { class: "hint", role: "status" });
  const button = make("button", { type: "submit", class: "primary" }, "Send");
  if (area) fillBody(area, { ...body, ...STARTS[path] });

  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    status.textContent = "Waiting …";
    answer.textContent = "";
    const startedAt = performance.now();
    try {
      const response = await send(address(path, parameters), {
        method: method.toUpperCase(),
        ...(area && { headers: { "Content-Type": "application/json" }, body: area.value }),
      });
      answer.hidden = false;
      await showBody(response, answer);
      status.textContent = `${response.status} ${response.statusText}, ${Math.round(performance.now() - startedAt)} ms`;
    } catch (error) {
      status.textContent = error.message;
    } finally {
      button.disabled = false;
    }
  };
  return make(
    "form",
    { class: "try", onsubmit: submit },
    parameters.map(({ name, input }) => make("label", {}, name, input)),
    area,
    make("div", { class: "try-foot" }, button, status),
    answer,
  );
}

async function fillBody(area, body) {
  const write = () => {
    area.value = JSON.stringify(body, null, 2);
    area.rows = area.value.split("\n").length;
  };
  write();
  if (body.model !== "") return;
  const before = area.value;
  const { data } = await getJson("v1/models", { quiet: true }).catch(() => ({ data: [] }));
  body.model = data[0]?.id ?? "";
  if (area.value === before) write(); // unless the user has started to edit
}

/** Relative, like every address of the page. */
function address(path, parameters) {
  const query = new URLSearchParams();
  for (const { name, in: place, input } of parameters) {
    if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(input.value));
    else if (input.value !== "") query.set(name, input.value);
  }
  return path.slice(1) + (query.size ? `?${query}` : "");
}

async function showBody(response, answer) {
  if (response.headers.get("Content-Type")?.startsWith("application/json")) {
    answer.textContent = shortened(JSON.stringify(await response.json(), null, 2));
    return;
  }
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    answer.append(decoder.decode(value, { stream: true }));
    if (answer.textContent.length > MAX_SHOWN_CHARS) {
      answer.append("\n…");
      reader.cancel();
      return;
    }
  }
}

function shortened(text) {
  return text.length > MAX_SHOWN_CHARS ? `${text.slice(0, MAX_SHOWN_CHARS)}\n…` : text;
}
