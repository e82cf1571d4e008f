// The playground: sends a prompt or a conversation with the parameters, and shows the response as it arrives.
// Knows the elements of its panel. run.js sends requests, parameters.js has the parameters, conversation.js the messages.

import { getJson } from "./api.js";
import { shortRevision } from "./adapters_view.js";
import { Conversation } from "./conversation.js";
import { $, copy, make, toast } from "./dom.js";
import { currentKey, onKeyChange } from "./key.js";
import { ParameterError, readParameters, showModels, startParameters } from "./parameters.js";
import { run, speed } from "./run.js";
import { asCurl, asPython } from "./snippets.js";
import { Waiting } from "./waiting.js";

const WIDE = matchMedia("(min-width: 900px)");
const STAGE_MARGIN_PX = 24;
const FINISH = { stop: "stop", length: "length limit", tool_calls: "tool call", stopped: "stopped by you" };

let conversation;
let controller = null; // of the running request, or null

export function startPlayground() {
  conversation = new Conversation();
  startParameters();
  const showParameters = () => ($("parameters").open = WIDE.matches);
  WIDE.addEventListener("change", showParameters);
  showParameters();
  for (const radio of $("mode").querySelectorAll("input")) radio.addEventListener("change", showMode);
  for (const area of [$("message"), $("prompt"), $("system")]) area.addEventListener("keydown", sendOnCtrlEnter);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && controller) stop();
  });
  $("editor").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", clear);
  $("append").addEventListener("click", append);
  $("copy-curl").addEventListener("click", () => copySnippet("curl command", asCurl));
  $("copy-python").addEventListener("click", () => copySnippet("Python program", asPython));
  onKeyChange(loadModels);
  showMode();
  loadModels();
}

function isChat() {
  return $("mode").querySelector("input:checked").value === "chat";
}

function showMode() {
  const chat = isChat();
  $("stage").classList.toggle("chat", chat);
  for (const id of ["system-box", "log", "message"]) $(id).hidden = !chat;
  $("chat-empty").hidden = !chat || !conversation.isEmpty;
  $("prompt").hidden = chat;
  $("output-box").hidden = chat || $("output").textContent === "";
  $("send").textContent = chat ? "Send" : "Continue";
  hideOutcome();
}

async function loadModels() {
  try {
    const { data } = await getJson("v1/models");
    showModels(data.map((model) => model.id));
    if (controller === null) hideTrouble();
  } catch (error) {
    showTrouble(error, { again: loadModels });
  }
}

/** The request that would be sent now. Throws ParameterError. */
function request(messages = null) {
  const parameters = readParameters();
  const { model, ...others } = parameters;
  if (!isChat()) return { path: "v1/completions", body: { model, prompt: $("prompt").value, ...others } };
  return { path: "v1/chat/completions", body: { model, messages: messages ?? draft(), ...others } };
}

/** The conversation with the text in the editor; if that is empty, the conversation that was sent last. */
function draft() {
  const message = $("message").value;
  if (message.trim() === "" && !conversation.isEmpty) return conversation.sentLast($("system").value);
  return conversation.toSend($("system").value, message);
}

async function submit() {
  if (controller) return;
  const area = isChat() ? $("message") : $("prompt");
  if (area.value.trim() === "") {
    area.focus();
    return;
  }
  if (!isChat()) {
    await complete();
    return;
  }
  const sent = whole(() => request());
  if (!sent) return;
  conversation.say(area.value);
  area.value = "";
  showWhatIsNext();
  if (conversation.openCall === null) await answer(sent); // otherwise another tool result is still missing
}

/** After a tool call, the editor asks for its result. */
function showWhatIsNext() {
  const name = conversation.openCall?.function.name;
  $("message").placeholder = name ? `Result of ${name}` : "Message";
}

/** Returns `read()`, or null after showing what is wrong with the parameters. */
function whole(read) {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof ParameterError)) throw error;
    $("parameters").open = true;
    const details = error.element.closest("details");
    if (details) details.open = true;
    showTrouble(error);
    error.element.focus();
    return null;
  }
}

async function answer({ path, body }) {
  const target = conversation.addAnswer(body.model);
  const outcome = await perform(path, body, {
    write: (text) => target.write(text),
    onToolCall: (delta) => following(() => target.writeToolCall(delta)),
    again: () => (target.isEmpty ? submit() : answerAgain()),
  });
  if (!target.isEmpty) {
    following(() => target.close({ length: "Cut at the length limit", stopped: "Stopped" }[outcome?.finishReason]));
    showWhatIsNext();
    return;
  }
  // A message without a response goes back into the editor: no template allows two user messages in a row.
  target.remove();
  const message = conversation.takeBack();
  if (message !== null && $("message").value === "") $("message").value = message;
  showWhatIsNext();
}

function answerAgain() {
  conversation.dropAnswer();
  showWhatIsNext();
  const sent = whole(() => request(conversation.toSend($("system").value)));
  if (sent) answer(sent);
}

async function complete() {
  const sent = whole(() => request());
  if (!sent) return;
  $("output").textContent = "";
  $("append").hidden = true;
  $("output-box").hidden = false;
  const node = $("output").appendChild(document.createTextNode(""));
  $("output").classList.add("writing");
  await perform(sent.path, sent.body, { write: (text) => node.appendData(text), again: complete });
  $("output").classList.remove("writing");
  $("output-box").hidden = isChat() || node.data === "";
  $("append").hidden = node.data === "";
}

/** Runs a request and updates the page. Returns the outcome, or null after showing a failure. */
async function perform(path, body, { write, onToolCall, again }) {
  const text = perFrame(write);
  controller = new AbortController();
  hideOutcome();
  showRunning(true);
  const waiting = new Waiting($("waiting"), body.model);
  const arrived = (use) => (piece) => {
    waiting.end();
    use?.(piece);
  };
  try {
    const outcome = await run(path, body, { signal: controller.signal, onText: arrived(text.add), onToolCall: arrived(onToolCall) });
    text.flush();
    following(() => showStats(outcome));
    return outcome;
  } catch (error) {
    text.flush();
    following(() => {
      if (error.outcome?.numPieces) showStats(error.outcome);
      showTrouble(error, { again });
    });
    return null;
  } finally {
    waiting.end();
    controller = null;
    showRunning(false);
  }
}

/** Calls `write` at most once per frame: a new layout of a long text for each token would take longer than the token. */
function perFrame(write) {
  let text = "";
  const flush = () => {
    if (text) following(() => write(text));
    text = "";
  };
  const add = (piece) => {
    if (!text) requestAnimationFrame(flush);
    text += piece;
  };
  return { add, flush };
}

/** Keeps the end of the stage visible while it grows, unless the user has scrolled away. */
function following(write) {
  const below = () => $("stage").getBoundingClientRect().bottom + STAGE_MARGIN_PX - innerHeight;
  const atEnd = below() < 40;
  write();
  if (atEnd && below() > 0) scrollBy(0, below());
}

function stop() {
  controller?.abort();
}

function clear() {
  stop();
  if (isChat()) conversation.clear();
  else $("prompt").value = $("output").textContent = "";
  showWhatIsNext();
  showMode();
  (isChat() ? $("message") : $("prompt")).focus();
}

function append() {
  $("prompt").value += $("output").textContent;
  $("output").textContent = "";
  showMode();
  $("prompt").focus();
  $("prompt").scrollTop = $("prompt").scrollHeight;
}

function showRunning(running) {
  const stopHadFocus = document.activeElement === $("stop");
  $("stop").hidden = !running;
  $("send").hidden = running;
  for (const radio of $("mode").querySelectorAll("input")) radio.disabled = running;
  $("editor").setAttribute("aria-busy", String(running));
  if (!running && stopHadFocus) (isChat() ? $("message") : $("prompt")).focus();
}

function showStats(outcome) {
  const { adapter, usage, numPieces, firstTextS, finishReason } = outcome;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const rate = speed(outcome);
  const rows = [
    ["Finish", FINISH[finishReason] ?? finishReason],
    ["Adapter", adapter && shortRevision(adapter)],
    ["Tokens", usage ? usage.completion_tokens : `about ${numPieces}`],
    ["Prompt", usage && `${usage.prompt_tokens}${cached ? `, ${cached} cached` : ""}`],
    ["Speed", rate && `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`],
    ["First token", firstTextS !== null && milliseconds(firstTextS)],
    ["Total", milliseconds(outcome.totalS)],
  ].filter(([, value]) => value);
  $("stats").replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  $("stats").hidden = false;
  $("announce").textContent = rows.map(([name, value]) => `${name}: ${value}`).join(", ");
}

function milliseconds(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
}

function showTrouble(error, { again = null } = {}) {
  const where = error.param && !error.message.includes(error.param) ? ` (${error.param})` : "";
  const when = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
  const button = again && make("button", { type: "button", class: "secondary", onclick: retry }, "Try again");
  function retry() {
    hideTrouble();
    again();
  }
  $("trouble").replaceChildren(...[make("p", {}, error.message + where + when), button].filter(Boolean));
  $("trouble").hidden = false;
}

function hideTrouble() {
  $("trouble").hidden = true;
}

function hideOutcome() {
  hideTrouble();
  $("stats").hidden = true;
  $("announce").textContent = "";
}

async function copySnippet(what, format) {
  const sent = whole(() => request());
  if (!sent) return;
  const base = new URL("v1", document.baseURI).href;
  const options = { withKey: currentKey() !== null, chat: isChat() };
  const text = format === asCurl ? asCurl(new URL(sent.path, document.baseURI).href, sent.body, options) : asPython(base, sent.body, options);
  toast((await copy(text)) ? `${what} copied` : "The browser does not allow access to the clipboard");
}

function sendOnCtrlEnter(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
}
