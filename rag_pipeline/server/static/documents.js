// Documents of an index: listed, uploaded, deleted; and the jobs that read them in.
import { call } from "./api.js";
import { $, make } from "./dom.js";

const PAGE = 25;
let shown = PAGE, polling = null;

export async function showDocuments() {
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

export function showMore() {
  shown += 4 * PAGE;
  return showDocuments();
}

export async function upload(files) {
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
