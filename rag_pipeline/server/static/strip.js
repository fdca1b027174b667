// The prompt as cells, one per token, coloured by what the engine did for it.

export const KINDS = {
  exact_prefix: "exact prefix (radix tree)",
  reused: "reused chunk KV",
  recomputed: "reused, then recomputed",
  fresh: "computed fresh",
  mixed: "reused or recomputed, not told apart",
};

const CELL_W = 6, CELL_H = 11, GAP = 1;

// One row a part of the prompt; returns nothing, fills `box`. `say` gets a line about the token pointed at.
export function drawStrip(box, segments, names, say) {
  const parts = [];
  for (const run of segments.runs) {
    const last = parts.at(-1);
    if (last && last.part === run.part) last.runs.push(run);
    else parts.push({ part: run.part, runs: [run] });
  }
  const rows = parts.map((part) => makeRow(part, names, say));
  box.replaceChildren(...rows.flatMap((row) => [row.label, row.canvas]));
  const paintAll = () => {
    // Widths are read before anything is painted, so that the layout is computed once.
    const widths = rows.map((row) => row.canvas.getBoundingClientRect().width);
    const colours = colourTable();
    rows.forEach((row, i) => row.paint(widths[i], colours));
  };
  box.repaint?.disconnect();
  box.repaint = new ResizeObserver(paintAll);
  box.repaint.observe(box);
  paintAll();
}

function makeRow({ part, runs }, names, say) {
  const start = runs[0].start, end = runs.at(-1).end;
  const label = document.createElement("span");
  label.className = "part";
  label.textContent = part === "system" ? "System" : part === "question" ? "Question" : `Chunk ${part}`;
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  const counts = {};
  for (const run of runs) counts[run.kind] = (counts[run.kind] ?? 0) + run.end - run.start;
  const told = Object.entries(counts).map(([kind, n]) => `${n} ${KINDS[kind]}`).join(", ");
  canvas.setAttribute("aria-label", `${label.textContent}, ${end - start} tokens: ${told}`);
  let perLine = 1;

  const kindAt = (token) => runs.find((run) => token >= run.start && token < run.end)?.kind;

  const paint = (width, colours) => {
    perLine = Math.max(1, Math.floor((width + GAP) / (CELL_W + GAP)));
    const lines = Math.ceil((end - start) / perLine);
    const scale = window.devicePixelRatio || 1;
    const height = lines * (CELL_H + GAP) - GAP;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    let token = start;
    for (const run of runs) {
      pen.fillStyle = colours[run.kind];
      for (; token < run.end; token++) {
        const at = token - start;
        const x = (at % perLine) * (CELL_W + GAP), y = Math.floor(at / perLine) * (CELL_H + GAP);
        pen.fillRect(x, y, CELL_W, CELL_H);
        if (run.kind === "mixed") pen.clearRect(x, y + CELL_H / 2 - 1, CELL_W, 2);
      }
    }
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / (CELL_W + GAP));
    const line = Math.floor((event.clientY - box.top) / (CELL_H + GAP));
    const token = start + line * perLine + Math.min(column, perLine - 1);
    const kind = kindAt(token);
    if (kind) say(`Token ${token}: ${KINDS[kind]}${names[part] ? `, ${names[part]}` : ""}`);
  });
  return { label, canvas, paint };
}

// Canvas knows no CSS variables: the colours of the present theme, read from a probe.
function colourTable() {
  const probe = document.createElement("i");
  document.body.append(probe);
  const table = {};
  for (const kind of Object.keys(KINDS)) {
    probe.style.color = `var(--${kind})`;
    table[kind] = getComputedStyle(probe).color;
  }
  probe.remove();
  return table;
}
