"use strict";
// The distributions of the scores, and the list of labels, of which some hundred rows at a time are made.

const KINDS = ["detection", "fuzzing"];
const AT_ONCE = 200;

/** Bars for the labels, a line for labels of other latents, and where chance is. */
function drawScores(holder, { label, shuffled }) {
  const n = label.length;
  const marks = [0, 0.25, 0.5, 0.75, 1].map((v) => [v, `${v}`]);
  const edges = Array.from({ length: n + 1 }, (_, i) => i / n);
  const height = 200;
  const top = Math.max(1, ...label, ...shuffled);
  const { x } = bars(holder, {
    edges, counts: label, marks: marks.slice(1, -1), scale: (count) => (count * Math.max(...label, 1)) / top, height,
    title: (i) => `${edges[i].toFixed(2)} – ${edges[i + 1].toFixed(2)}: ${format.count(label[i])} latents; ${format.count(shuffled[i])} with the label of another`,
    label: "Histogram of scores",
  });
  const y = (count) => height - 20 - (count / top) * (height - 28);
  const line = shuffled.map((count, i) => `${i ? "H" : "M"}${x(edges[i])}${i ? "" : `,${y(count)}`}V${y(count)}H${x(edges[i + 1])}`).join("");
  const plot = holder.querySelector("svg");
  plot.insertBefore(svg("path", { d: line, class: "other" }), plot.querySelector("g"));
  plot.insertBefore(svg("line", { x1: x(0.5), x2: x(0.5), y1: 4, y2: height - 20, class: "level" }), plot.querySelector("g"));
}

(async () => {
  const [columns, scores] = await Promise.all(["labels", "scores"].map(saePages.load));
  for (const kind of KINDS) {
    const holder = document.getElementById(kind);
    redraw(holder, () => drawScores(holder, scores[kind]));
    tooltip(holder, ".target", (target) => [make("p", {}, target.dataset.title)]);
  }

  const input = document.getElementById("query");
  const sortBox = document.getElementById("sort");
  const rows = document.getElementById("rows");
  const more = document.getElementById("more");
  const text = columns.label.map((label) => (label ?? "").toLowerCase());
  const order = () => {
    const words = input.value.toLowerCase().match(/\S+/g) ?? [];
    const found = [...columns.latent.keys()].filter((i) => words.every((word) => text[i].includes(word) || `${columns.latent[i]}` === word.replace(/^#/, "")));
    const key = columns[sortBox.value];
    const value = (i) => (sortBox.value === "latent" ? -key[i] : (key[i] ?? -1));
    return found.sort((a, b) => value(b) - value(a) || columns.latent[a] - columns.latent[b]);
  };
  const of = (kind, i) => {
    const value = columns[kind][i];
    const cell = make("span", { className: "of", title: kind });
    cell.setAttribute("aria-label", `${kind} ${value ?? "not measured"}`);
    cell.append(make("b", {}, value === null ? "–" : value.toFixed(2)), make("span", { className: "bar", style: { "--v": value ?? 0 } }));
    return cell;
  };
  const row = (i) => make("li", {},
    columns.paged[i] ? make("a", { href: `../pages/latent.html#${columns.latent[i]}` }, `${columns.latent[i]}`) : make("span", {}, `${columns.latent[i]}`),
    make("span", { className: columns.label[i] === null ? "label quiet" : "label" }, columns.label[i] ?? "no label"),
    ...KINDS.map((kind) => of(kind, i)));

  let matching = [];
  function add() {
    const shown = rows.childElementCount;
    rows.append(...matching.slice(shown, shown + AT_ONCE).map(row));
    more.hidden = rows.childElementCount >= matching.length;
  }
  function show() {
    matching = order();
    rows.replaceChildren();
    add();
    document.getElementById("matches").textContent = `${format.count(matching.length)} of ${format.count(columns.latent.length)} latents`;
    history.replaceState(null, "", `#${new URLSearchParams({ q: input.value, sort: sortBox.value })}`);
  }

  const given = new URLSearchParams(location.hash.slice(1));
  input.value = given.get("q") ?? "";
  if ([...sortBox.options].some((option) => option.value === given.get("sort"))) sortBox.value = given.get("sort");
  input.addEventListener("input", show);
  sortBox.addEventListener("change", show);
  more.addEventListener("click", add);
  new IntersectionObserver((seen) => seen[0].isIntersecting && !more.hidden && add()).observe(more);
  show();
  document.body.classList.add("ready");
})().catch((error) => document.querySelector("main").prepend(make("p", { className: "message", role: "alert" }, error.message)));
