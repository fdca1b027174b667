// A question: asked, its answer streamed, its sources and what it cost.
import { call, events } from "./api.js";
import { $, make } from "./dom.js";
import { KINDS, drawStrip } from "./strip.js";

let running = null, lastStrip = null;

export const isRunning = () => running !== null;
export const stop = () => running?.abort();
export const repaint = () => lastStrip?.();

function options() {
  const rag = { k: Number($("k").value) || 4 };
  for (const name of ["index", "search", "policy"]) if ($(name).value) rag[name] = $(name).value;
  if ($("ratio").value !== "") rag.ratio = Number($("ratio").value);
  return rag;
}

export async function ask(event) {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  running = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  $("problem").hidden = true;
  $("answer-card").hidden = false;
  $("strip-card").hidden = true;
  $("answer").replaceChildren();
  $("answer").classList.add("busy");
  $("sources").replaceChildren();
  let text = "", citations = [], rag = null, usage = null;
  try {
    const answer = await call("chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        messages: [{ role: "user", content: question }],
        rag: options(),
        max_tokens: Number($("tokens").value) || 160,
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    for await (const piece of events(answer)) {
      if (piece.error) throw new Error(piece.error.message);
      if (piece.rag?.citations) showSources((citations = piece.rag.citations));
      else if (piece.rag) rag = piece.rag;
      if (piece.usage) usage = piece.usage;
      const more = piece.choices?.[0]?.delta?.content;
      if (more) {
        text += more;
        $("answer").append(more);
      }
    }
    if (rag) showMarks(text, rag.attributions, citations);
    if (rag && usage) showCost(rag, usage, citations);
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error.message);
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").hidden = true;
    $("answer").classList.remove("busy");
  }
}

function showProblem(message) {
  $("problem").textContent = message;
  $("problem").hidden = false;
}

function showSources(citations) {
  $("sources").replaceChildren(
    ...citations.map((item) => {
      const button = make("button", undefined, "quiet");
      button.type = "button";
      button.append(make("span", String(item.number), "n"), make("span", item.title, "t"),
        make("span", item.score.toFixed(3), "s"));
      button.addEventListener("click", () => openChunk(item));
      const entry = make("li");
      entry.append(button);
      return entry;
    }),
  );
}

// Markers go behind the sentences whose words stand in a chunk; see the note in the API's answer.
// Offsets count code points on the server, UTF-16 units here.
export function showMarks(text, attributions, citations) {
  const points = Array.from(text);
  const nodes = [];
  let at = 0;
  for (const { end, number } of attributions) {
    nodes.push(points.slice(at, end).join(""));
    const item = citations.find((citation) => citation.number === number);
    const mark = make("button", String(number), "mark");
    mark.type = "button";
    mark.setAttribute("aria-label", `Source ${number}: ${item?.title ?? ""}`);
    mark.addEventListener("click", () => openChunk(item));
    nodes.push(mark);
    at = end;
  }
  nodes.push(points.slice(at).join(""));
  $("answer").replaceChildren(...nodes);
}

function openChunk(item) {
  $("chunk-title").textContent = `${item.number}. ${item.title}`;
  const place = item.path && item.path !== item.title ? `${item.path}, ` : "";
  $("chunk-where").textContent =
    `${place}score ${item.score.toFixed(3)}, prompt tokens ${item.tokens[0]} to ${item.tokens[1]}`;
  $("chunk-text").textContent = item.text;
  $("chunk").showModal();
}

function showCost(rag, usage, citations) {
  const kinds = usage.prompt_tokens_details;
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  const numbers = [
    ["Time to first token", `${rag.timing.ttft_s.toFixed(2)} s`],
    ["Computed of the prompt", percent(rag.computed_fraction_of_prompt)],
    ["Prompt tokens", usage.prompt_tokens],
    ["Answer tokens", usage.completion_tokens],
    ["Search", `${(1000 * rag.timing.retrieve_s).toFixed(0)} ms`],
    ["Policy", rag.fused ? `${rag.policy}${rag.ratio === null ? "" : ` ${rag.ratio}`}` : "ordinary prefill"],
  ];
  $("numbers").replaceChildren(
    ...numbers.map(([name, value]) => {
      const box = make("div");
      box.append(make("dt", name), make("dd", String(value)));
      return box;
    }),
  );
  const present = new Set(rag.segments.runs.map((run) => run.kind));
  $("legend").replaceChildren(
    ...Object.entries(KINDS).filter(([kind]) => kind !== "mixed" || present.has(kind)).map(([kind, name]) => {
      const entry = make("li"), swatch = make("i");
      swatch.style.background = `var(--${kind})`;
      const count = kind === "mixed" ? "" : ` ${kinds[`${kind}_tokens`]}`;
      entry.append(swatch, `${name}${count}`);
      return entry;
    }),
  );
  const notes = [];
  if (rag.segments.resolution === "part")
    notes.push("The engine counted the tokens of each kind and did not name them one by one.");
  // A prompt that lies in the radix tree is served exactly, which nobody need be told of.
  if (rag.fallback && rag.fallback !== "in_exact_prefix") {
    const reason = rag.fallback === "miss" ? "no KV of these chunks was stored yet" : rag.fallback;
    notes.push(`Prefilled as usual${rag.fused ? " in part" : ""}: ${reason}.`);
  }
  $("strip-note").textContent = notes.join(" ");
  $("strip-card").hidden = false;
  const names = Object.fromEntries(citations.map((item) => [item.number, item.title]));
  lastStrip = () => drawStrip($("strip"), rag.segments, names, (line) => ($("token").textContent = line));
  lastStrip();
}
