// The chat's messages: as values to send, and as a list to look at. Knows nothing of requests.

import { $, make } from "./dom.js";

const NAMES = { user: "You", assistant: "Model" };

/** The messages so far. An answer is added empty, and grows. */
export class Conversation {
  #messages = [];
  #list = $("log");
  #empty = $("chat-empty");

  get isEmpty() {
    return this.#messages.length === 0;
  }

  get endsWithUser() {
    return this.#messages.at(-1)?.role === "user";
  }

  /** As the API wants them, the system prompt first if there is one. */
  toSend(system) {
    const first = system.trim() ? [{ role: "system", content: system }] : [];
    return [...first, ...this.#messages.map(({ role, content, tool_calls }) => ({
      role,
      content: tool_calls && !content ? null : content,
      ...(tool_calls && { tool_calls }),
    }))];
  }

  addUser(content) {
    this.#add({ role: "user", content });
  }

  /** Takes the last message of the user back, and gives its text; null where there is none. */
  takeBack() {
    if (!this.endsWithUser) return null;
    const { content } = this.#messages.at(-1);
    this.#remove(this.#messages.at(-1));
    return content;
  }

  /** An answer to be written: {write(text), writeToolCall(delta), close(note), remove(), isEmpty}. */
  addAnswer() {
    const message = { role: "assistant", content: "" };
    const text = this.#add(message);
    const item = message.item;
    const node = text.appendChild(document.createTextNode(""));
    item.classList.add("writing");
    return {
      write(piece) {
        message.content += piece;
        node.appendData(piece);
      },
      writeToolCall(delta) {
        message.tool_calls ??= [];
        const call = (message.tool_calls[delta.index ?? 0] ??= { id: delta.id, type: "function", function: { name: "", arguments: "" } });
        call.function.name += delta.function.name ?? "";
        call.function.arguments += delta.function.arguments ?? "";
        const calls = message.tool_calls.map((c) => `${c.function.name}(${c.function.arguments})`);
        text.dataset.calls = calls.join("\n");
      },
      close(note = null) {
        item.classList.remove("writing");
        if (note) item.append(make("p", { class: "note" }, note));
      },
      remove: () => this.#remove(message),
      get isEmpty() {
        return message.content === "" && !message.tool_calls;
      },
    };
  }

  /** Takes the last answer away, so that it can be given again. */
  dropAnswer() {
    while (!this.isEmpty && !this.endsWithUser) this.#remove(this.#messages.at(-1));
  }

  clear() {
    this.#messages = [];
    this.#list.replaceChildren();
    this.#empty.hidden = false;
  }

  /** message: {role, content, tool_calls, item}, the last being its place in the list. */
  #add(message) {
    this.#messages.push(message);
    this.#empty.hidden = true;
    const text = make("div", { class: "text" }, message.role === "user" && message.content);
    message.item = make("li", { class: message.role }, make("p", { class: "who" }, NAMES[message.role]), text);
    this.#list.append(message.item);
    return text;
  }

  #remove(message) {
    this.#messages = this.#messages.filter((other) => other !== message);
    message.item.remove();
    this.#empty.hidden = !this.isEmpty;
  }
}
