// The API reference: every operation of /openapi.json with its parameters, its responses, and a form to try it.
// Knows OpenAPI's operations. schema.js shows schemas, try.js is the form.

import { getJson } from "./api.js";
import { $, make } from "./dom.js";
import { askForKey, currentKey, onKeyChange } from "./key.js";
import { exampleOf, prose, showSchema } from "./schema.js";
import { makeTry } from "./try.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

async function start() {
  $("key-button").addEventListener("click", () => askForKey());
  const showKey = () => ($("key-button").hidden = currentKey() === null);
  onKeyChange(showKey);
  showKey();
  await load();
}

async function load() {
  try {
    show(await getJson("openapi.json"));
  } catch (error) {
    const again = make("button", { type: "button", class: "primary", onclick: load }, "Try again");
    $("main").replaceChildren(make("div", { class: "empty", role: "alert" }, make("p", {}, error.message), again));
  }
}

function show(spec) {
  const groups = Map.groupBy(operationsOf(spec), ({ group }) => group);
  const sections = [...groups].map(([name, operations]) =>
    make("section", {}, make("h2", {}, name), operations.map((operation) => showOperation(operation, spec))),
  );
  const links = [...groups].map(([name, operations]) => [
    make("h2", {}, name),
    make("ul", {}, operations.map(({ id, method, path }) => make("li", {}, make("a", { href: `#${id}` }, badge(method), breakable(path))))),
  ]);
  $("main").replaceChildren(
    make("h1", {}, `${spec.info.title} ${spec.info.version}`),
    make("p", { class: "lead" }, spec.info.description, " The document itself is at ", make("a", { href: "openapi.json" }, "/openapi.json"), "."),
    ...sections,
  );
  $("contents").replaceChildren(...links.flat());
  addEventListener("hashchange", openFromAddress);
  openFromAddress();
}

function operationsOf(spec) {
  return Object.entries(spec.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => {
      const operation = item[method];
      const group = operation.tags?.[0] ?? (path.startsWith("/v1/") ? "Models" : "Server");
      return { path, method, group, operation, id: operation.operationId ?? `${method}${path}` };
    }),
  );
}

function openFromAddress() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.matches("details.operation")) {
    target.open = true;
    target.scrollIntoView();
  }
}

/** Filled when it is opened, since most operations never are. */
function showOperation(entry, spec) {
  const { id, method, path, operation } = entry;
  const body = make("div", { class: "operation-body" });
  const details = make(
    "details",
    { class: "operation", id },
    make("summary", {}, badge(method), code(path), make("span", { class: "summary" }, operation.summary)),
    body,
  );
  details.addEventListener("toggle", () => {
    if (details.open && !body.hasChildNodes()) body.append(...describe(entry, spec));
  });
  return details;
}

function describe(entry, spec) {
  const { operation } = entry;
  const parameters = operation.parameters ?? [];
  const request = operation.requestBody?.content["application/json"];
  return [
    operation.description && make("p", {}, prose(operation.description)),
    part("Try it", makeTry(entry, request && (request.example ?? exampleOf(request.schema, spec)))),
    parameters.length > 0 && part("Parameters", make("dl", { class: "fields" }, parameters.map((p) => showParameter(p)))),
    request && part("Body", showSchema(request.schema, spec)),
    part("Responses", make("div", { class: "answers" }, Object.entries(operation.responses).map((r) => showAnswer(r, spec)))),
  ].filter(Boolean);
}

function showParameter({ name, in: place, required, description }) {
  const kind = `${place}${required ? ", required" : ""}`;
  return make("div", {}, make("dt", {}, code(name), make("span", { class: "type" }, kind)), description && make("dd", {}, prose(description)));
}

function showAnswer([status, { description, content = {} }], spec) {
  const head = [make("span", { class: status < 400 ? "status good" : "status" }, status), make("span", {}, prose(description))];
  const kinds = Object.entries(content).filter(([, { schema }]) => schema);
  if (!kinds.length) return make("div", { class: "answer" }, head);
  const box = make("div", {});
  const details = make("details", { class: "answer" }, make("summary", {}, head), box);
  details.addEventListener("toggle", () => {
    if (details.open && !box.hasChildNodes()) {
      for (const [type, media] of kinds) {
        box.append(make("p", { class: "type" }, type), showSchema(media.schema, spec));
        if (media["x-event"]) box.append(make("p", { class: "type" }, "each event"), showSchema(media["x-event"], spec));
      }
    }
  });
  return details;
}

function part(title, ...children) {
  return make("section", { class: "part" }, make("h3", {}, title), ...children);
}

function badge(method) {
  return make("span", { class: `method ${method}` }, method.toUpperCase());
}

/** A path with line breaks allowed before its slashes. */
function breakable(path) {
  return make("code", {}, path.split(/(?=\/)/).flatMap((part) => [make("wbr"), part]));
}

function code(text) {
  return make("code", {}, text);
}

start();
