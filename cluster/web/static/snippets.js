// A request as a curl command and as a Python program: exactly the body that the page would send, with the key from the environment.
// Pure functions; knows shell quoting, Python literals and which parameters the openai client takes by name.

const KEY = "TRAMONTANE_API_KEY";
const CLIENT_PARAMETERS = new Set(
  `model messages prompt suffix max_tokens max_completion_tokens temperature top_p n stream stream_options stop seed
  presence_penalty frequency_penalty logit_bias logprobs top_logprobs echo best_of user response_format tools tool_choice
  parallel_tool_calls`.split(/\s+/),
);

/** A curl command for a POSIX shell. url: the endpoint's. */
export function asCurl(url, body, { withKey }) {
  const lines = [
    `curl -N ${quote(url)}`,
    "-H 'Content-Type: application/json'",
    withKey && `-H "Authorization: Bearer $${KEY}"`,
    `--data-raw ${quote(JSON.stringify(body))}`,
  ];
  return lines.filter(Boolean).join(" \\\n  ") + "\n";
}

/** A program for the openai package. base: the API's URL, ending in /v1. chat: which of the two endpoints. */
export function asPython(base, body, { withKey, chat }) {
  const named = [];
  const extra = {};
  for (const [name, value] of Object.entries(body)) {
    if (CLIENT_PARAMETERS.has(name) && !(name === "response_format" && !chat)) named.push([name, value]);
    else extra[name] = value;
  }
  if (Object.keys(extra).length) named.push(["extra_body", extra]);
  const key = withKey ? `os.environ["${KEY}"]` : '"none"';
  const text = chat ? "chunk.choices[0].delta.content or \"\"" : "chunk.choices[0].text";
  const whole = chat ? "answer.choices[0].message.content" : "answer.choices[0].text";
  const use = body.stream
    ? ["for chunk in answer:", "    if chunk.choices:", `        print(${text}, end="", flush=True)`, "print()"]
    : [`print(${whole})`];
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base)}, api_key=${key})`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...named.map(([name, value]) => `    ${name}=${literal(value)},`),
    ")",
    ...use,
    "",
  ].join("\n");
}

function quote(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Strings and numbers are the same in JSON and Python. */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
