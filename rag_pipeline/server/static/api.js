// Talking to the server: one call with the key of the settings, and the events of a stream.
import { $ } from "./dom.js";

const base = new URL("v1/rag/", new URL(".", location.href));

// Throws an error with one line to show; `status` is that of an answer that refuses.
export async function call(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  let answer;
  try {
    answer = await fetch(new URL(path, base), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
  if (!answer.ok) throw Object.assign(new Error(await reason(answer)), { status: answer.status });
  return answer;
}

async function reason(answer) {
  if (answer.status === 401) {
    $("settings").open = true;
    return "the server wants an API key; put it into Settings";
  }
  try {
    const body = await answer.json();
    return body.error?.message ?? body.message ?? `status ${answer.status}`;
  } catch {
    return `status ${answer.status}`;
  }
}

export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += value;
    const lines = pending.split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}
