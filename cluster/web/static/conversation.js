// The chat's messages: as values to send, and as a list on the page. Knows no requests.

import { $, make } from "./dom.js";

const NAMES = { user: "You", tool: "Result" };

/** The messages so far. A response is added empty and then grows. */
export class Conversation {
  #messages = [];
  #list = $("log");
  #empty = $("chat-empty");

  get isEmpty() {
    return this.#messages.length === 0;
  }

  /** Whether the model has to respond: the last message is not its own. */
  get awaitsAnswer() {
    return !this.isEmpty && this.#messages.at(-1).role !== "assistant";
  }

  /** The first tool call of the last response without a result, or null. The next message is its result. */
  get openCall() {
    const last = this.#messages.findLastIndex((message) => message.role === "assistant");
    const results = this.#messages.slice(last + 1).map((message) => message.tool_call_id);
    return this.#messages[last]?.tool_calls?.find((call) => !results.includes(call.id)) ?? null;
  }

  /** The messages in the API's format: the system prompt first, if any, and `said` as the newest message. */
  toSend(system, said = null) {
    const first = system.trim() ? [{ role: "system", content: system }] : [];
    const all = said === null ? this.#messages : [...this.#messages, this.#message(said)];
    return [...first, ...all.map(asSent)];
  }

  /** The same without the last response: the messages that were sent for it. */
  sentLast(system) {
    const end = this.#messages.findLastIndex((message) => message.role !== "assistant") + 1;
    return this.toSend(system).slice(0, end + (system.trim() ? 1 : 0));
  }

  /** Adds the user's text: a message, or the result of a tool call. */
  say(content) {
    this.#add(this.#message(content));
  }

  #message(content) {
    const call = this.openCall;
    return call ? { role: "tool", tool_call_id: call.id, content } : { role: "user", content };
  }

  /** Removes the user's last message and returns its text; null if there is none. */
  takeBack() {
    if (!this.awaitsAnswer) return null;
    const { content } = this.#messages.at(-1);
    this.#remove(this.#messages.at(-1));
    return content;
  }

  /** A response of `model` to write: {write(text), writeToolCall(delta), close(note), remove(), isEmpty}. */
  addAnswer(model) {
    const message = { role: "assistant", content: "" };
    const text = this.#add(message, model);
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

  /** Removes the last response, so that it can be generated again. */
  dropAnswer() {
    while (!this.isEmpty && !this.awaitsAnswer) this.#remove(this.#messages.at(-1));
  }

  clear() {
    this.#messages = [];
    this.#list.replaceChildren();
    this.#empty.hidden = false;
  }

  /** message: {role, content, tool_calls, item}; `item` is its element in the list. */
  #add(message, who = NAMES[message.role]) {
    this.#messages.push(message);
    this.#empty.hidden = true;
    const text = make("div", { class: "text" }, message.role !== "assistant" && message.content);
    message.item = make("li", { class: message.role }, make("p", { class: "who" }, who), text);
    this.#list.append(message.item);
    return text;
  }

  #remove(message) {
    this.#messages = this.#messages.filter((other) => other !== message);
    message.item.remove();
    this.#empty.hidden = !this.isEmpty;
  }
}

function asSent({ role, content, tool_calls: calls, tool_call_id: id }) {
  if (calls) return { role, content: content || null, tool_calls: calls };
  return id ? { role, content, tool_call_id: id } : { role, content };
}
