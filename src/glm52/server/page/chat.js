// The conversation: what was said, how it is shown, and what the keys and buttons do.

import { make, render } from "./markdown.js";
import { Refused, complete } from "./stream.js";
import { DEMO, run } from "./tools.js";

const $ = id => document.getElementById(id);
const log = $("log"), prompt = $("prompt");
let messages = [];
let running = null; // of the reply that is being streamed: its AbortController

const say = text => ($("status").textContent = text);
const seconds = ms => `${(ms / 1000).toFixed(1)} s`;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// ── Asking ─────────────────────────────────────────────────────────────────────────────────────────────────────────

function send(text) {
  log.querySelectorAll(".facts button, .call form").forEach(node => node.remove());
  messages = [...answered(messages), { role: "user", content: text }];
  turn("user", text);
  ask();
}

// Calls nobody answered would confuse the model: it is told so.
function answered(messages) {
  const done = new Set(messages.map(m => m.tool_call_id));
  const open = (messages.at(-1)?.role === "user" ? [] : messages.flatMap(m => m.tool_calls ?? [])).filter(c => !done.has(c.id));
  return [...messages, ...open.map(c => ({ role: "tool", tool_call_id: c.id, content: "(no result was given)" }))];
}

async function ask() {
  const view = new View(turn("assistant")), aborter = (running = new AbortController());
  let reply = null;
  busy(true);
  say("Waiting for the server");
  try {
    reply = await complete(body(), $("key").value.trim(), aborter.signal, r => view.show((reply = r)));
    view.end(reply, facts(reply));
    say(`Done. ${$("log").querySelectorAll(".assistant .call form").length ? "A tool waits for your answer." : ""}`);
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Refused)) console.error(error);
    const stopped = error.name === "AbortError";
    view.end(reply && { ...reply, calls: [] }, stopped ? ["stopped"] : [], stopped ? "" : error.message);
    say(stopped ? "Stopped." : `Error: ${error.message}`);
    reply = reply && { ...reply, calls: [] };
  }
  if (aborter !== running) return; // a new chat was begun meanwhile
  running = null;
  busy(false);
  if (reply && (reply.content || reply.calls.length)) remember(reply, view);
}

function body() {
  const thinking = $("thinking").checked, tools = [...($("demo").checked ? DEMO : []), ...pasted()];
  return {
    messages, stream: true, stream_options: { include_usage: true }, thinking: { type: thinking ? "enabled" : "disabled" },
    ...(thinking && { reasoning_effort: $("effort").value }), ...(tools.length && { tools }),
  };
}

function pasted() {
  const text = $("tools").value.trim();
  if (!text) return [];
  try {
    return [JSON.parse(text)].flat();
  } catch (error) {
    throw new Refused(`The tools are not valid JSON: ${error.message}`);
  }
}

function remember(reply, view) {
  const { content, reasoning, calls } = reply;
  messages.push({
    role: "assistant", content, ...(reasoning && { reasoning_content: reasoning }), ...(calls.length && { tool_calls: calls }),
  });
  if (!calls.length) return;
  const mine = messages, open = new Set(calls.map(c => c.id));
  for (const call of calls) {
    const answer = text => {
      mine.push({ role: "tool", tool_call_id: call.id, content: text });
      open.delete(call.id);
      if (!open.size && messages === mine && !running) ask();
    };
    const result = run(call.function);
    view.result(call, result, answer);
    if (result !== undefined) answer(result);
  }
}

function retry() {
  const at = messages.findLastIndex(m => m.role === "user");
  messages = messages.slice(0, at + 1);
  while (log.lastElementChild && !log.lastElementChild.matches(".user")) log.lastElementChild.remove();
  ask();
}

// ── Showing ────────────────────────────────────────────────────────────────────────────────────────────────────────

function turn(kind, text = "") {
  $("hello").hidden = true;
  const node = make("section", { className: `turn ${kind}`, ariaLabel: kind === "user" ? "You" : "Model" }, text);
  log.append(node);
  log.scrollTop = log.scrollHeight;
  return node;
}

class View {
  constructor(node) {
    this.node = node;
    this.label = make("summary", {}, "Thinking");
    this.reasoning = make("p");
    this.thought = make("details", { className: "thought", hidden: true }, this.label, this.reasoning);
    this.answer = make("div", { className: "answer" });
    this.cards = new Map();
    node.append(this.thought, this.answer);
  }

  // At most once a frame, however fast the tokens come.
  show(reply) {
    this.reply = reply;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    const { reasoning, content, calls, thought } = this.reply, live = !thought && !this.reply.ended;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    this.frame = null;
    this.thought.hidden = !reasoning;
    this.thought.toggleAttribute("data-live", live);
    this.label.textContent = live ? `Thinking, ${many(reasoning.split(/\s+/).length, "word")}` : `Thought for ${seconds((thought ?? this.reply.ended) - this.reply.first)}`;
    this.reasoning.textContent = reasoning;
    this.answer.replaceChildren(render(content));
    for (const call of calls) this.card(call).querySelector("pre").textContent = call.function.arguments;
    say(content || calls.length ? "Answering" : reasoning ? "Thinking" : "Waiting for the server");
    if (follows) log.scrollTop = log.scrollHeight;
  }

  card(call) {
    if (!this.cards.has(call.id)) {
      const summary = make("summary", {}, "Tool call ", make("b", {}, call.function.name));
      const card = make("details", { className: "call", open: true }, summary, make("pre", { tabIndex: 0, ariaLabel: "Arguments" }));
      this.cards.set(call.id, card);
      this.node.append(card);
    }
    return this.cards.get(call.id);
  }

  // What a tool said; or a place where the user says it.
  result(call, text, answer) {
    const card = this.card(call), shown = t => make("pre", { tabIndex: 0, ariaLabel: "Result" }, t);
    if (text !== undefined) return card.append(shown(text));
    const input = make("input", { ariaLabel: `Result of ${call.function.name}`, placeholder: "Its result, by you" });
    const form = make("form", {}, input, make("button", { type: "submit" }, "Return"));
    form.addEventListener("submit", event => {
      event.preventDefault();
      form.replaceWith(shown(input.value));
      answer(input.value);
    });
    card.append(form);
  }

  end(reply, facts, error = "") {
    if (this.frame) cancelAnimationFrame(this.frame);
    if (reply) {
      this.reply = { ...reply, ended: reply.ended ?? performance.now() };
      this.draw();
    }
    if (error) this.node.append(make("p", { className: "error" }, error));
    const again = make("button", { type: "button", title: "Ask for another reply" }, "Retry");
    again.addEventListener("click", retry);
    log.querySelectorAll(".facts button").forEach(button => button.remove());
    this.node.append(make("div", { className: "facts" }, ...facts.map(f => make("span", {}, f)), again));
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
  }
}

const ENDS = {
  length: "cut off: no room for more", repetition: "ended: it went round in circles", tool_calls: "calls tools", stop: "",
};

function facts({ usage, began, first, ended, finish, closed }) {
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0, said = usage?.completion_tokens ?? 0;
  const speed = said > 1 && ended > first ? `${((said - 1) / (ended - first) * 1000).toFixed(1)} tokens/s` : "";
  return [
    many(said, "token"), speed, first ? `first after ${seconds(first - began)}` : "",
    `${cached} of ${many(usage?.prompt_tokens ?? 0, "prompt token")} from cache`,
    closed ? "thinking was cut short" : "", ENDS[finish] ?? finish,
  ].filter(Boolean);
}

function busy(is) {
  $("send").textContent = is ? "Stop" : "Send";
  log.setAttribute("aria-busy", is);
  log.querySelectorAll(".facts button").forEach(button => (button.disabled = is));
}

// ── Keys and buttons ───────────────────────────────────────────────────────────────────────────────────────────────

$("form").addEventListener("submit", event => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (running) return running.abort();
  if (!text) return;
  prompt.value = "";
  fit();
  send(text);
});

prompt.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) $("form").requestSubmit();
});

document.addEventListener("keydown", event => event.key === "Escape" && running?.abort());
$("thinking").addEventListener("change", () => ($("effort").disabled = !$("thinking").checked));
prompt.addEventListener("input", fit);

$("clear").addEventListener("click", () => {
  running?.abort();
  running = null;
  messages = [];
  busy(false);
  log.querySelectorAll(".turn").forEach(node => node.remove());
  $("hello").hidden = false;
  say("");
  prompt.focus();
});

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

fetch("/health").then(r => r.json()).then(({ model }) => (document.title = $("model").textContent = model)).catch(() => {});
