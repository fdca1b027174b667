// The chunk cache by tier.
import { call } from "./api.js";
import { $, make } from "./dom.js";

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

export async function showCache() {
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
