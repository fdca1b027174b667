// The chunk cache by tier.
import { call } from "./api.js";
import { $, make } from "./dom.js";

export const count = (value) => (value === undefined || value === null ? "–" : value.toLocaleString("en"));

function size(bytes) {
  if (bytes === undefined || bytes === null) return "–";
  const steps = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = Math.min(steps.length - 1, bytes > 0 ? Math.floor(Math.log2(bytes) / 10) : 0);
  return `${(bytes / 2 ** (10 * step)).toFixed(step ? 1 : 0)} ${steps[step]}`;
}

// Tiers that are shared tell no chunks and bytes, a tenant's own figures no misses and drops.
const FIGURES = [
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
    const shown = FIGURES.filter(([, read]) => told.tiers.some((tier) => read(tier) !== "–"));
    // A column per tier: there are three at most, and a card beside the question has room for no more.
    $("cache-names").replaceChildren(...["Tier", ...told.tiers.map((tier) => tier.name)].map((name) => head("col", name)));
    $("cache-rows").replaceChildren(
      ...shown.map(([name, read]) => {
        const row = make("tr");
        row.append(head("row", name));
        for (const tier of told.tiers) {
          const text = read(tier);
          const isBad = (name === "Dropped" || name === "Failed") && !["0", "–"].includes(text);
          row.append(make("td", text, isBad ? "bad" : ""));
        }
        return row;
      }),
    );
    const down = told.tiers.filter((tier) => tier.guard && tier.guard.state !== "closed");
    note(down.map((tier) => `${tier.name} does not answer`).join("; "));
    if (!down.length && told.memory.answers) $("cache-note").textContent = memoryLine(told.memory);
  } catch (error) {
    note(error.message);
  }
}

const memoryLine = (memory) =>
  `Memories of long conversations: ${count(memory.loaded)} of ${count(memory.answers)} answers loaded one, ` +
  `${count(memory.missed)} missed it; ${count(memory.build_forward_tokens)} tokens were computed to build them`;

function head(scope, name) {
  const cell = make("th", name);
  cell.scope = scope;
  return cell;
}

function note(problem) {
  $("cache-note").textContent = problem;
  $("cache-note").className = problem ? "bad" : "hint";
}
