// The page: its state, and what each control does. One module per role beside it.
import { call } from "./api.js";
import { ask, isRunning, repaint, stop } from "./ask.js";
import { count, showCache } from "./cache.js";
import { showDocuments, showMore, upload } from "./documents.js";
import { $, make } from "./dom.js";

async function showHealth() {
  const box = $("health");
  try {
    const health = await (await call("health")).json();
    box.dataset.state = health.status;
    const fusion = health.gate.on ? `fusion on (${health.gate.policy})` : "fusion off";
    const store = health.cache.store?.chunks_now;
    box.textContent = `${health.model}, ${fusion}${store === undefined ? "" : `, ${count(store)} chunks cached`}`;
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
$("stop").addEventListener("click", stop);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("key").addEventListener("change", () => showHealth().then(showDocuments).then(showCache));
$("cache").addEventListener("toggle", showCache);
$("index").addEventListener("change", showDocuments);
$("more").addEventListener("click", showMore);
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
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

await showHealth();
await showDocuments();
setInterval(() => isRunning() || document.hidden || showHealth().then(showCache), 15000);
