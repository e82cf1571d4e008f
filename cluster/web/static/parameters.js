// The form of parameters: a table of fields, and the part of a request's body that they fill.
// An empty field is not sent, so the server's default applies. The server checks bounds; here they only configure the inputs.

import { $, make } from "./dom.js";

const GROUPS = [
  {
    fields: [
      { name: "max_tokens", label: "Max tokens", min: 0, step: 1, value: 256, integer: true },
      { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.7, slider: true },
      { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, placeholder: "1", slider: true },
    ],
  },
  {
    title: "Sampling",
    fields: [
      { name: "top_k", label: "Top k", min: -1, step: 1, placeholder: "off", integer: true },
      { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, placeholder: "off" },
      { name: "seed", label: "Seed", step: 1, placeholder: "random", integer: true },
    ],
  },
  {
    title: "Penalties",
    fields: [
      { name: "presence_penalty", label: "Presence", min: -2, max: 2, step: 0.1, placeholder: "0" },
      { name: "frequency_penalty", label: "Frequency", min: -2, max: 2, step: 0.1, placeholder: "0" },
      { name: "repetition_penalty", label: "Repetition", min: 0.01, max: 100, step: 0.05, placeholder: "1" },
    ],
  },
];
const MAX_STOP_STRINGS = 4;
const FORMATS = { text: "Text", json_object: "Any JSON object", json_schema: "JSON with a schema" };
const EXAMPLE_SCHEMA = { type: "object", properties: { name: { type: "string" } }, required: ["name"] };

/** A value in the form is invalid; `element` is its field. */
export class ParameterError extends Error {
  constructor(message, element) {
    super(message);
    this.element = element;
  }
}

/** Builds the form once. */
export function startParameters() {
  const form = $("parameter-form");
  form.append(
    make("div", { class: "field tall" }, make("label", { for: "model" }, "Model"), make("select", { id: "model" })),
    ...GROUPS.map((group) => makeGroup(group)),
    makeStop(),
    makeFormat(),
    makeMore(),
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  $("model").addEventListener("change", showChosen);
}

/** names: the models to choose from. */
export function showModels(names) {
  const before = $("model").value;
  $("model").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(before)) $("model").value = before;
  showChosen();
}

/** The model's name, where the form is closed. */
function showChosen() {
  $("chosen").textContent = $("model").value;
}

/** The body without its prompt. Throws ParameterError. */
export function readParameters() {
  const body = { model: $("model").value };
  for (const field of GROUPS.flatMap((group) => group.fields)) {
    const value = readNumber(field);
    if (value !== null) body[field.name] = value;
  }
  const stop = readStop();
  if (stop.length) body.stop = stop;
  const format = $("response_format").value;
  if (format === "json_schema") {
    body.response_format = { type: format, json_schema: { name: "answer", schema: readJson("schema", "The schema") } };
  } else if (format !== "text") {
    body.response_format = { type: format };
  }
  return { ...body, stream: true, stream_options: { include_usage: true }, ...readMore() };
}

function makeGroup({ title, fields }) {
  const rows = fields.map(makeNumber);
  if (!title) return make("div", { class: "fields" }, rows);
  return make("fieldset", { class: "fields" }, make("legend", {}, title), rows);
}

function makeNumber({ name, label, min, max, step, value, placeholder, slider }) {
  const input = make("input", { id: name, type: "number", min, max, step: "any", value, placeholder, inputmode: "decimal" });
  if (!slider) return make("div", { class: "field" }, make("label", { for: name }, label), input);
  const range = make("input", { type: "range", min, max, step, value: value ?? placeholder, "aria-label": `${label}, slider` });
  range.addEventListener("input", () => (input.value = range.value));
  input.addEventListener("input", () => (range.value = input.value || placeholder || value));
  return make("div", { class: "field with-slider" }, make("label", { for: name }, label), input, range);
}

function readNumber({ name, label, integer }) {
  const input = $(name);
  if (input.validity.badInput) throw new ParameterError(`${label} is not a number.`, input);
  if (input.value === "") return null;
  const value = Number(input.value);
  if (integer && !Number.isSafeInteger(value)) throw new ParameterError(`${label} must be a whole number.`, input);
  return value;
}

function makeStop() {
  return make(
    "div",
    { class: "field tall" },
    make("label", { for: "stop-strings" }, "Stop at"),
    make("textarea", { id: "stop-strings", class: "code", rows: 2, spellcheck: "false", "aria-describedby": "stop-hint" }),
    make("p", { class: "hint", id: "stop-hint" }, `One string per line, at most ${MAX_STOP_STRINGS}. Write \\n for a line break and \\t for a tab.`),
  );
}

function readStop() {
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  const lines = $("stop-strings").value.split("\n").filter((line) => line !== "");
  if (lines.length > MAX_STOP_STRINGS) {
    throw new ParameterError(`Enter at most ${MAX_STOP_STRINGS} stop strings.`, $("stop-strings"));
  }
  return lines.map((line) => line.replace(/\\([nt\\])/g, (_, sign) => escapes[sign]));
}

function makeFormat() {
  const options = Object.entries(FORMATS).map(([value, label]) => make("option", { value }, label));
  const select = make("select", { id: "response_format" }, options);
  const schema = make("textarea", { id: "schema", class: "code", rows: 8, spellcheck: "false", "aria-label": "JSON schema" });
  schema.value = JSON.stringify(EXAMPLE_SCHEMA, null, 2);
  schema.hidden = true;
  select.addEventListener("change", () => (schema.hidden = select.value !== "json_schema"));
  return make("div", { class: "field tall" }, make("label", { for: "response_format" }, "Response format"), select, schema);
}

function makeMore() {
  const area = make("textarea", {
    id: "more",
    class: "code",
    rows: 3,
    spellcheck: "false",
    placeholder: '{"min_tokens": 8}',
    "aria-describedby": "more-hint",
  });
  return make(
    "details",
    { class: "more" },
    make("summary", {}, "More"),
    make("div", { class: "field tall" }, make("label", { for: "more" }, "Other fields of the body"), area),
    make("p", { class: "hint", id: "more-hint" }, "A JSON object, merged into the request."),
  );
}

function readMore() {
  if ($("more").value.trim() === "") return {};
  const fields = readJson("more", "The text in Other fields");
  if (fields === null || typeof fields !== "object" || Array.isArray(fields)) {
    throw new ParameterError("The text in Other fields is not a JSON object.", $("more"));
  }
  if ((fields.n ?? 1) !== 1) throw new ParameterError("The page shows one choice. Remove n.", $("more"));
  return fields;
}

function readJson(id, what) {
  try {
    return JSON.parse($(id).value);
  } catch (error) {
    throw new ParameterError(`${what} is not JSON: ${error.message}.`, $(id));
  }
}
