// The page: asks, streams, shows sources and cost, uploads. All text goes in as text, never as mark-up.
import { KINDS, drawStrip } from "./strip.js";

const $ = (id) => document.getElementById(id);
const base = new URL("v1/rag/", new URL(".", location.href));
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};

// ---- talking to the server ------------------------------------------------------------------

async function call(path, options = {}) {
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

async function* events(answer) {
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

// ---- asking ---------------------------------------------------------------------------------

let running = null, lastStrip = null;

function options() {
  const rag = { k: Number($("k").value) || 4 };
  for (const name of ["index", "search", "policy"]) if ($(name).value) rag[name] = $(name).value;
  if ($("ratio").value !== "") rag.ratio = Number($("ratio").value);
  return rag;
}

async function ask(event) {
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

// ---- documents ------------------------------------------------------------------------------

const PAGE = 25;
let shown = PAGE, polling = null;

async function showDocuments() {
  const query = new URLSearchParams({ limit: String(shown) });
  if ($("index").value) query.set("index", $("index").value);
  let list;
  try {
    list = await (await call(`documents?${query}`)).json();
  } catch (error) {
    $("docs-count").textContent = error.message;
    return;
  }
  $("docs-count").textContent = `${list.total} in ${list.index}`;
  $("docs").replaceChildren(...list.data.map(documentEntry));
  $("more").hidden = list.data.length >= list.total;
  showJobs(list.jobs);
}

function documentEntry(item) {
  const entry = make("li"), button = make("button", "Delete", "quiet");
  const name = make("span", item.id.replace(/^uploads\//, ""));
  name.title = item.id;
  button.type = "button";
  button.setAttribute("aria-label", `Delete ${item.id}`);
  button.addEventListener("click", () => remove(item.id, button));
  entry.append(name, make("span", item.chunks === 1 ? "1 chunk" : `${item.chunks} chunks`, "hint"), button);
  return entry;
}

// The first click asks, the second one deletes: no dialog that a script or a slip confirms.
async function remove(id, button) {
  if (button.textContent !== "Sure?") {
    button.textContent = "Sure?";
    setTimeout(() => (button.textContent = "Delete"), 4000);
    return;
  }
  button.disabled = true;
  const query = $("index").value ? `?${new URLSearchParams({ index: $("index").value })}` : "";
  try {
    await call(`documents/${id.split("/").map(encodeURIComponent).join("/")}${query}`, { method: "DELETE" });
  } catch (error) {
    $("docs-count").textContent = error.message;
  }
  await showDocuments();
}

function showJobs(jobs) {
  const fresh = jobs.filter((job) => job.state !== "done" || Date.now() / 1000 - job.created < 300).slice(0, 5);
  $("jobs").replaceChildren(...fresh.map(jobEntry));
  const open = jobs.some((job) => job.state !== "done" && job.state !== "failed");
  clearTimeout(polling);
  if (open) polling = setTimeout(showDocuments, 700);
}

function jobEntry(job) {
  const entry = make("li");
  const what = job.files.length === 1 ? job.files[0] : `${job.files.length} files`;
  const state = job.state === "done" ? `${job.documents} documents, ${job.chunks} new chunks` : job.state;
  entry.append(make("strong", what), ` ${state}`);
  if (job.error) entry.append(make("div", job.error, "bad"));
  else for (const item of job.skipped) entry.append(make("div", `${item.name}: ${item.reason}`, "bad"));
  for (const item of job.notes) entry.append(make("div", `${item.name}: ${item.note}`));
  if (job.state !== "done" && job.state !== "failed") {
    const bar = make("progress");
    bar.max = 1;
    bar.value = job.progress;
    bar.setAttribute("aria-label", `Progress of ${what}`);
    entry.append(bar);
  }
  return entry;
}

async function upload(files) {
  if (!files.length) return;
  const form = new FormData();
  for (const file of files) form.append("file", file, file.name);
  if ($("index").value) form.append("index", $("index").value);
  try {
    await call("documents", { method: "POST", body: form });
  } catch (error) {
    $("jobs").prepend(make("li", error.message, "bad"));
    return;
  }
  await showDocuments();
}

// ---- the chunk cache ------------------------------------------------------------------------

const count = (value) => (value === undefined || value === null ? "–" : value.toLocaleString("en"));

function size(bytes) {
  if (bytes === undefined || bytes === null) return "–";
  const steps = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = Math.min(steps.length - 1, bytes > 0 ? Math.floor(Math.log2(bytes) / 10) : 0);
  return `${(bytes / 2 ** (10 * step)).toFixed(step ? 1 : 0)} ${steps[step]}`;
}

// Tiers that are shared tell no chunks and bytes, a tenant's own figures no misses and drops.
const COLUMNS = [
  ["Chunks", (tier) => count(tier.chunks)],
  ["Size", (tier) => size(tier.bytes)],
  ["Hits", (tier) => count(tier.hits)],
  ["Misses", (tier) => count(tier.misses)],
  ["Dropped", (tier) => count(tier.dropped)],
  ["Failed", (tier) => count(tier.failed)],
];

async function showCache() {
  if (!$("cache").open) return;
  try {
    const told = await (await call("cache")).json();
    const shown = COLUMNS.filter(([, read]) => told.tiers.some((tier) => read(tier) !== "–"));
    $("cache-names").replaceChildren(
      ...["Tier", ...shown.map(([name]) => name)].map((name) => {
        const head = make("th", name);
        head.scope = "col";
        return head;
      }),
    );
    $("cache-rows").replaceChildren(
      ...told.tiers.map((tier) => {
        const row = make("tr");
        const head = make("th", tier.name);
        head.scope = "row";
        row.append(head);
        for (const [name, read] of shown) {
          const text = read(tier);
          const isBad = (name === "Dropped" || name === "Failed") && !["0", "–"].includes(text);
          row.append(make("td", text, isBad ? "bad" : ""));
        }
        return row;
      }),
    );
    const down = told.tiers.filter((tier) => tier.guard && tier.guard.state !== "closed");
    $("cache-note").textContent = down.map((tier) => `${tier.name} does not answer`).join("; ");
  } catch (error) {
    $("cache-note").textContent = error.message;
  }
}

// ---- state and wiring -----------------------------------------------------------------------

async function showHealth() {
  const box = $("health");
  try {
    const health = await (await call("health")).json();
    box.dataset.state = health.status;
    const fusion = health.gate.on ? `fusion on (${health.gate.policy})` : "fusion off";
    const store = health.cache.store.chunks_now;
    box.textContent = `${health.model}, ${fusion}${store === undefined ? "" : `, ${store} chunks cached`}`;
    box.title = health.problems.join("; ");
    const names = Object.keys(health.index);
    if ($("index").options.length !== names.length)
      $("index").replaceChildren(...names.map((name) => make("option", name)));
    $("limits").textContent =
      `text, Markdown, HTML, PDF, JSON; at most ${Math.round(health.limits.max_upload_bytes / 2 ** 20)} MB at once`;
  } catch (error) {
    box.dataset.state = "down";
    box.textContent = error.message;
  }
}

$("ask").addEventListener("submit", (event) => ask(event).then(showHealth));
$("stop").addEventListener("click", () => running?.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("key").addEventListener("change", () => showHealth().then(showDocuments).then(showCache));
$("cache").addEventListener("toggle", showCache);
$("index").addEventListener("change", showDocuments);
$("more").addEventListener("click", () => {
  shown += 4 * PAGE;
  showDocuments();
});
$("files").addEventListener("change", () => {
  upload([...$("files").files]).then(() => ($("files").value = ""));
});
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") upload([...event.dataTransfer.files]);
  });
}
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  lastStrip?.();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => lastStrip?.());

await showHealth();
await showDocuments();
setInterval(() => running || document.hidden || showHealth().then(showCache), 15000);
