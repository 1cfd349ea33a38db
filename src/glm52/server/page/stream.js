// One streamed chat completion: what is asked, and what its chunks add up to.

export class Refused extends Error {}

// Calls more(reply) as the reply grows -> the reply: {reasoning, content, calls, finish, usage, began, first, ended}.
export async function complete(body, key, signal, more) {
  const reply = { reasoning: "", content: "", calls: [], finish: null, closed: null, usage: null, began: performance.now() };
  for await (const event of events(body, key, signal)) {
    if (event.error) throw new Refused(event.error.message);
    reply.usage = event.usage ?? reply.usage;
    for (const choice of event.choices) add(reply, choice);
    more(reply);
  }
  reply.ended = performance.now();
  if (reply.finish === null) throw new Refused("The connection ended before the reply did.");
  return reply;
}

function add(reply, { delta, finish_reason, thinking_closed }) {
  const said = delta.reasoning_content || delta.content || delta.tool_calls;
  if (said) reply.first ??= performance.now();
  reply.reasoning += delta.reasoning_content ?? "";
  if (reply.reasoning && (delta.content || delta.tool_calls)) reply.thought ??= performance.now();
  reply.content += delta.content ?? "";
  for (const { index, id, function: part } of delta.tool_calls ?? []) {
    const call = (reply.calls[index] ??= { id, type: "function", function: { name: part.name, arguments: "" } });
    call.function.arguments += part.arguments ?? "";
  }
  reply.finish = finish_reason ?? reply.finish;
  reply.closed = thinking_closed ?? reply.closed;
}

async function* events(body, key, signal) {
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused("The server cannot be reached. Is it still running?");
  }
  if (!answer.ok) throw new Refused(await reason(answer));
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read().catch(lost)).done; ) {
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
    }
  }
}

function lost(error) {
  throw error.name === "AbortError" ? error : new Refused("The connection to the server was lost.");
}

async function reason(answer) {
  const error = (await answer.json().catch(() => ({}))).error?.message ?? `The server answered with status ${answer.status}.`;
  if (answer.status === 401) return `${error} Enter it under “Tools and key”.`;
  return answer.status === 429 || answer.status === 503 ? `${error} Try again in a moment.` : error;
}
