// The API key: where it is stored, and the dialog that asks for it.
// It is in sessionStorage, which ends with the tab, or in localStorage if the user wants it remembered. Knows one request, which checks a
// key before it is stored; api.js knows the others.

import { $, make } from "./dom.js";

const STORE = "tramontane.key";
const listeners = new Set();
let inMemory = null; // if the browser forbids storage
let asking = null; // the open dialog, shared by all requests that need a key

/** The key, or null. */
export function currentKey() {
  try {
    return sessionStorage.getItem(STORE) ?? localStorage.getItem(STORE) ?? inMemory;
  } catch {
    return inMemory;
  }
}

/** `listener` is called after each change. */
export function onKeyChange(listener) {
  listeners.add(listener);
}

function keep(key, remember) {
  inMemory = key;
  try {
    sessionStorage.removeItem(STORE);
    localStorage.removeItem(STORE);
    if (key !== null) (remember ? localStorage : sessionStorage).setItem(STORE, key);
  } catch {
    // the key is valid until the page is closed
  }
  for (const listener of listeners) listener();
}

export function authorization(key = currentKey()) {
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

/** Asks for a key; `problem` says what is wrong with the current one. Resolves to whether there is a valid key. */
export function askForKey(problem = null) {
  asking ??= ask(problem).finally(() => (asking = null));
  return asking;
}

function ask(problem) {
  const dialog = document.getElementById("key-dialog") ?? document.body.appendChild(makeDialog());
  const input = $("key");
  const save = $("key-save");
  let accepted = false;

  const complain = (text) => {
    $("key-error").textContent = text ?? "";
    $("key-error").hidden = !text;
    input.setAttribute("aria-invalid", String(Boolean(text)));
  };
  const submit = async (event) => {
    event.preventDefault();
    const key = input.value.trim();
    complain(null);
    save.disabled = true;
    const refusal = await tryKey(key);
    save.disabled = false;
    if (!dialog.open) return; // the user has cancelled
    if (refusal) {
      complain(refusal);
      input.select();
      return;
    }
    accepted = true;
    keep(key, $("key-remember").checked);
    dialog.close();
  };
  const forget = () => {
    keep(null, false);
    dialog.close();
  };
  const cancel = () => dialog.close();

  input.value = "";
  complain(problem);
  $("key-forget").hidden = currentKey() === null;
  $("key-form").addEventListener("submit", submit);
  $("key-forget").addEventListener("click", forget);
  $("key-cancel").addEventListener("click", cancel);
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        $("key-form").removeEventListener("submit", submit);
        $("key-forget").removeEventListener("click", forget);
        $("key-cancel").removeEventListener("click", cancel);
        input.value = ""; // do not leave the key in the field
        resolve(accepted);
      },
      { once: true },
    );
  });
}

/** Why the server does not accept this key, or null. */
async function tryKey(key) {
  if (!/^[!-~]+$/.test(key)) return "A key has only letters, digits and punctuation, without spaces.";
  try {
    const response = await fetch("v1/models", { headers: authorization(key) });
    return response.status === 401 ? "The server does not accept this key." : null;
  } catch {
    return "The server does not respond. Try again in a moment.";
  }
}

function makeDialog() {
  const button = (id, kind, text) => make("button", { type: "button", class: kind, id }, text);
  const key = { id: "key", type: "password", autocomplete: "current-password", spellcheck: "false", autocapitalize: "none" };
  return make(
    "dialog",
    { id: "key-dialog", "aria-labelledby": "key-title" },
    make(
      "form",
      { method: "dialog", id: "key-form" },
      make("h2", { id: "key-title" }, "API key"),
      make("p", {}, "This server requires an API key."),
      make("label", { for: "key" }, "Key"),
      make("input", { ...key, required: true, "aria-describedby": "key-error key-hint" }),
      make("p", { class: "field-error", id: "key-error", role: "alert", hidden: true }),
      make("label", { class: "check" }, make("input", { type: "checkbox", id: "key-remember" }), "Remember it in this browser"),
      make("p", { class: "hint", id: "key-hint" }, "Otherwise it is deleted when you close this tab. It is sent only to this server."),
      make(
        "div",
        { class: "dialog-actions" },
        button("key-forget", "quiet danger", "Forget key"),
        button("key-cancel", "secondary", "Cancel"),
        make("button", { type: "submit", class: "primary", id: "key-save" }, "Use key"),
      ),
    ),
  );
}
