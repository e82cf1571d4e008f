// Shows the JSON schemas of OpenAPI 3.1: types, bounds, nested objects that open, and an example.
// Knows the keywords that msgspec writes. Knows no operation.

import { make } from "./dom.js";

/** A schema's fields, or its type if it has none. */
export function showSchema(schema, spec) {
  const { properties, required = [], description } = resolve(schema, spec);
  if (!properties) {
    const nested = shapesOf(schema, spec);
    return make("div", {}, make("p", { class: "type" }, typeOf(schema, spec)), description && make("p", {}, prose(description)), nested);
  }
  const names = Object.keys(properties).sort((a, b) => required.includes(b) - required.includes(a));
  return make(
    "div",
    {},
    description && make("p", { class: "about" }, prose(description)),
    make("dl", { class: "fields" }, names.map((name) => showField(name, properties[name], required.includes(name), spec))),
  );
}

/** The smallest valid body. */
export function exampleOf(schema, spec) {
  const whole = resolve(schema, spec);
  if (whole.examples?.length) return whole.examples[0];
  if ("const" in whole) return whole.const;
  if (whole.enum) return whole.enum[0];
  const options = optionsOf(whole);
  if (options) return exampleOf(options.find((option) => option.type !== "null"), spec);
  if (whole.type === "object") {
    const names = whole.required ?? [];
    return Object.fromEntries(names.map((name) => [name, exampleOf(whole.properties[name], spec)]));
  }
  if (whole.type === "array") return whole.minItems ? [exampleOf(whole.items, spec)] : [];
  return { string: "", integer: whole.minimum ?? 0, number: whole.minimum ?? 0, boolean: false }[whole.type] ?? null;
}

/** Text with `code` marked. */
export function prose(text = "") {
  return text.split(/`([^`]+)`/).map((piece, i) => (i % 2 ? make("code", {}, piece) : piece));
}

function showField(name, schema, required, spec) {
  const whole = resolve(schema, spec);
  const notes = [required && "required", ...boundsOf(schema, spec)].filter(Boolean);
  return make(
    "div",
    {},
    make("dt", {}, make("code", {}, name), make("span", { class: "type" }, [typeOf(schema, spec), ...notes].join(", "))),
    make("dd", {}, schema === whole && whole.description && make("p", {}, prose(whole.description)), shapesOf(schema, spec)),
  );
}

function resolve(schema, spec) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.slice(2).split("/").reduce((node, step) => node[step], spec);
}

function optionsOf(schema) {
  return schema.anyOf ?? schema.oneOf;
}

/** Like "string | integer[]"; null is not shown, since every optional field allows it. */
function typeOf(schema, spec) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const options = optionsOf(schema);
  if (options) return options.filter((o) => o.type !== "null").map((o) => typeOf(o, spec)).join(" | ");
  if (schema.type === "array") {
    const items = typeOf(schema.items ?? {}, spec);
    return items.includes(" | ") ? `(${items})[]` : `${items}[]`;
  }
  if (schema.type === "object" && schema.additionalProperties?.type) return `object of ${typeOf(schema.additionalProperties, spec)}`;
  return [schema.type ?? "any"].flat().join(" | ");
}

function boundsOf(schema) {
  const parts = [schema, ...(optionsOf(schema) ?? [])];
  const value = (keyword) => parts.map((part) => part[keyword]).find((found) => found !== undefined && found !== null);
  const said = (keyword, text) => value(keyword) !== undefined && Math.abs(value(keyword)) < 2 ** 31 - 1 && `${text} ${value(keyword)}`;
  return [
    said("minimum", "≥"),
    said("exclusiveMinimum", ">"),
    said("maximum", "≤"),
    said("exclusiveMaximum", "<"),
    said("maxItems", "at most"),
    said("maxLength", "characters ≤"),
    value("default") !== undefined && `default ${JSON.stringify(value("default"))}`,
  ];
}

/** The objects inside a type, each one to open. Filled when opened, since they may contain themselves. */
function shapesOf(schema, spec) {
  return refsOf(schema).map((ref) => {
    const box = make("div", { class: "nested" });
    const details = make("details", { class: "shape" }, make("summary", {}, ref.split("/").at(-1)), box);
    details.addEventListener("toggle", () => {
      if (details.open && !box.hasChildNodes()) box.append(showSchema({ $ref: ref }, spec));
    });
    return details;
  });
}

function refsOf(schema) {
  if (!schema || typeof schema !== "object") return [];
  if (schema.$ref) return [schema.$ref];
  return [...new Set([...(optionsOf(schema) ?? []), schema.items, schema.additionalProperties].flatMap(refsOf))];
}
