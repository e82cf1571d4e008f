// Says why a response has not begun, once that takes long: a model that sleeps is being started, or all replicas are busy.
// Knows GET /health/ready, which every key may ask. Knows no view but the element that it writes to.

import { send } from "./api.js";

const AFTER_MS = 1500;
const EVERY_MS = 1000;

export class Waiting {
  #element;
  #model;
  #startedAt = performance.now();
  #timer;
  #over = false;

  /** Begins to wait for the first text of this model. Call `end` when it has come, or will not. */
  constructor(element, model) {
    this.#element = element;
    this.#model = model;
    this.#timer = setTimeout(() => this.#tell(), AFTER_MS);
  }

  end() {
    this.#over = true;
    clearTimeout(this.#timer);
    this.#element.hidden = true;
  }

  async #tell() {
    const reason = await reasonOf(this.#model);
    if (this.#over) return;
    const seconds = Math.round((performance.now() - this.#startedAt) / 1000);
    this.#element.textContent = `Waiting for ${this.#model} for ${seconds} s. ${reason ?? "Its replicas are busy."}`;
    this.#element.hidden = false;
    this.#timer = setTimeout(() => this.#tell(), EVERY_MS);
  }
}

/** What the server says of the model's readiness, or null. A failure is told where the response itself fails. */
async function reasonOf(model) {
  try {
    const response = await send(`health/ready?model=${encodeURIComponent(model)}`, { cache: "no-store", quiet: true });
    return (await response.json()).reason ?? null;
  } catch {
    return null;
  }
}
