// Creates and finds elements. Text is added as text nodes, never as HTML, so a model's output stays text.
// Knows no view of the page.

/** The element with this id. Throws if it is missing, which is a bug. */
export function $(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page has no #${id}`);
  return element;
}

/** make("p", {class: "x", onclick: f, hidden: true}, "text", child): false, null and undefined are skipped. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== false && c !== null && c !== undefined));
  return element;
}

let toastTimer = 0;

/** Shows a message at the bottom of the page for a moment. */
export function toast(text) {
  const element = document.querySelector(".toast") ?? document.body.appendChild(make("div", { class: "toast", role: "status" }));
  element.textContent = text;
  element.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => element.classList.remove("shown"), 2500);
}

/** Copies to the clipboard; returns whether that worked. Without HTTPS, browsers allow only the old way. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}
