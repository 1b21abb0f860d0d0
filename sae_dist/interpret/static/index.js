"use strict";

const FIGURES = [
  // [keys in the run's summary, what it is called, how it is written]
  [["eval", "loss_recovered"], "loss recovered", format.percent],
  [["eval", "fvu"], "variance unexplained", format.percent],
  [["eval", "l0"], "L0, active per token", (x) => format.number(x)],
  [["eval", "dead_fraction"], "dead", format.percent],
  [["eval", "cosine"], "cosine", (x) => format.number(x)],
  [["tokens_trained"], "tokens trained", format.short],
];

function lookUp(value, keys) {
  for (const key of keys) value = value !== null && typeof value === "object" && Object.hasOwn(value, key) ? value[key] : undefined;
  return value;
}

function flatten(value, path = []) {
  if (value === null || typeof value !== "object") return [[path.join("."), value]];
  return Object.entries(value).flatMap(([key, inner]) => flatten(inner, [...path, key]));
}

function showHeader(facts, silent, pages) {
  const { summary } = facts;
  document.getElementById("name").textContent = summary.name ?? "Features";
  document.title = `${summary.name ?? "Run"} · features`;
  const parts = [
    [summary.model, summary.hook].filter((part) => typeof part === "string").join(" · "),
    `${format.count(facts.n_latents)} latents`,
    `seen on ${format.short(facts.rows)} tokens`,
    silent ? `${format.count(silent)} silent there` : "none silent there",
    pages < facts.n_latents ? `pages for a sample of ${format.count(pages)}` : "",
  ];
  document.getElementById("subtitle").textContent = parts.filter(Boolean).join("  ·  ");
  const figures = FIGURES.map(([keys, name, write]) => [name, lookUp(summary, keys), write]).filter(([, x]) => x !== undefined);
  document.getElementById("figures").replaceChildren(
    ...figures.map(([name, x, write]) => make("div", {}, make("dt", {}, name), make("dd", {}, x === null ? "not measured" : write(x)))));
  const rows = flatten(summary);
  document.getElementById("details").hidden = rows.length === 0;
  document.getElementById("all-figures").replaceChildren(
    ...rows.flatMap(([key, x]) => [make("dt", {}, key), make("dd", {}, x === null ? "not measured" : `${x}`)]));
}

const COLUMNS = [
  { name: "Latent", sort: "latent", className: "c-latent" },
  { name: "Fires on", className: "c-tokens" },
  { name: "Density", sort: "density", className: "c-density" },
  { name: "Max", sort: "max", className: "c-max" },
  { name: "Category", sort: "purity", className: "c-category" },
  { name: "Promotes", className: "c-promoted" },
];

(async () => {
  const [facts, tokens, columns] = await Promise.all(["summary", "tokens", "index"].map(saePages.load));
  const index = makeIndex(columns, facts, tokens);
  const fired = columns.count.filter((n) => n > 0).length;
  showHeader(facts, facts.n_latents - fired, columns.tokens.length);
  document.body.classList.toggle("unlabelled", facts.categories.length === 0);

  let query = readQuery(location.hash);
  let order = [];
  const input = document.getElementById("query");
  const sortBox = document.getElementById("sort");
  const silentBox = document.getElementById("all");
  const rangeChip = document.getElementById("range");
  const rows = document.getElementById("rows");
  for (const [key, { name }] of Object.entries(SORTS))
    if (key !== "purity" || facts.categories.length) sortBox.append(make("option", { value: key }, name));

  // The table: only the rows in sight exist.
  const logDensity = columns.count.map((n) => (n > 0 ? Math.log10(n / facts.rows) : -Infinity));
  const logMax = columns.maximum.map((x) => (x > 0 ? Math.log10(x) : -Infinity));
  const finite = (values) => values.filter(Number.isFinite);
  const span = (values) => {
    const [low, high] = finite(values).reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
    if (low > high) return [-1, 0];
    const room = Math.max(0.04 * (high - low), 0.05);
    return [low - room, high + room];
  };
  const densityRange = span(logDensity);
  const maxRange = span(logMax);
  const live = new Map();

  function makeRow(latent, place) {
    const page = index.slot[latent];
    const count = columns.count[latent];
    const category = columns.category[latent];
    const link = page < 0 || count === 0 ? make("span", {}, `${latent}`) : make("a", { href: latentAddress(latent, query) }, `${latent}`);
    const chips = (ids, className) => ids.map((id) => make("span", { className }, tokenAlone(tokens[id], { trim: className === "chip" })));
    const cell = (className, ...children) => make("div", { className: `cell ${className}`, role: "cell" }, ...children);
    const share = (logDensity[latent] - densityRange[0]) / (densityRange[1] - densityRange[0]);
    const bar = (value, className = "") => make("span", { className: `bar ${className}`, style: { "--v": Math.max(0, value).toFixed(3) } });
    const row = make("div", { className: "row", role: "row", "aria-rowindex": `${place + 2}`, style: { top: `${place * height}px` } },
      cell("c-latent", link),
      cell("c-tokens", ...(page < 0 ? [make("span", { className: "quiet" }, count ? "no page" : "")] : chips(columns.tokens[page], "chip"))),
      cell("c-density", ...(count ? [make("span", { className: "n" }, format.percent(count / facts.rows)), bar(share)] : [make("span", { className: "quiet" }, "silent")])),
      cell("c-max", ...(count ? [make("span", { className: "n" }, format.number(columns.maximum[latent]))] : [])),
      cell("c-category", ...(count && category >= 0
        ? [make("span", { className: columns.purity[latent] < 2 * chance(category) ? "name weak" : "name" }, facts.categories[category]), make("span", { className: "n" }, `${Math.round(100 * columns.purity[latent])} %`), bar(columns.purity[latent], "pure")]
        : [])),
      cell("c-promoted", ...(page < 0 || !count ? [] : chips(columns.promoted[page], "word"))));
    return row;
  }

  function chance(category) {
    return facts.category_rows[category] / facts.rows;
  }

  let height = 0; // of a row; asking the style for it costs a layout

  function paint() {
    const top = rows.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / height) - 6);
    const last = Math.min(order.length, Math.ceil((innerHeight - top) / height) + 6);
    for (const [place, row] of live) if (place < first || place >= last) row.remove(), live.delete(place);
    const added = document.createDocumentFragment();
    for (let place = first; place < last; place++)
      if (!live.has(place)) {
        const row = makeRow(order[place], place);
        live.set(place, row);
        added.append(row);
      }
    rows.append(added);
  }

  function refill() {
    height = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    live.clear();
    rows.replaceChildren();
    rows.style.height = `${Math.max(1, order.length) * height}px`;
    if (!order.length) rows.append(make("p", { className: "nothing" }, "No latent matches."));
    paint();
  }

  // The distributions.
  const N_BARS = 60;
  const edges = Array.from({ length: N_BARS + 1 }, (_, i) => densityRange[0] + (i / N_BARS) * (densityRange[1] - densityRange[0]));
  const histogram = (latents) => {
    const counts = new Array(N_BARS).fill(0);
    for (const latent of latents)
      if (Number.isFinite(logDensity[latent]))
        counts[Math.min(N_BARS - 1, Math.floor(((logDensity[latent] - edges[0]) / (edges[N_BARS] - edges[0])) * N_BARS))]++;
    return counts;
  };
  const everything = histogram(columns.count.keys());
  const densityBox = document.getElementById("density");
  const scatterBox = document.getElementById("scatter");
  let densityScale, dots;
  const drawDensity = redraw(densityBox, () => {
    const chosen = histogram(order);
    const brushBox = densityBox.querySelector(".brush");
    densityScale = bars(densityBox, {
      edges, counts: everything, strong: order.length < fired ? chosen : null, marks: logTicks(...densityRange), scale: (n) => n, height: 220,
      title: (i) => `${format.percent(10 ** edges[i])} – ${format.percent(10 ** edges[i + 1])} of tokens: ${format.count(everything[i])} latents`,
      label: `Histogram of the density of ${fired} latents that fired`,
    });
    if (brushBox) densityBox.append(brushBox);
  });
  const drawScatter = redraw(scatterBox, () => {
    dots = scatter(scatterBox, {
      xs: logDensity, ys: logMax, chosen: order, xMarks: logTicks(...densityRange), yMarks: logTicks(...maxRange),
      xRange: densityRange, yRange: maxRange, height: 220, label: "Density against maximal activation",
    });
  });
  tooltip(densityBox, ".target", (target) => [make("p", {}, target.dataset.title)]);
  const tip = tooltip(scatterBox, ".none", () => null);
  scatterBox.addEventListener("pointermove", (event) => {
    const frame = scatterBox.getBoundingClientRect();
    const latent = dots.nearest(event.clientX - frame.left, event.clientY - frame.top);
    scatterBox.classList.toggle("over", latent >= 0);
    tip.box.hidden = latent < 0;
    if (latent < 0) return;
    const page = index.slot[latent];
    tip.box.replaceChildren(
      make("p", {}, make("b", {}, `${latent}`), ` fires on ${format.percent(columns.count[latent] / facts.rows)}, up to ${format.number(columns.maximum[latent])}`),
      make("p", {}, ...(page < 0 ? [] : columns.tokens[page].map((id) => make("span", { className: "chip" }, tokenAlone(tokens[id], { trim: true }))))));
    tip.place(event.clientX, event.clientY);
  });
  brush(densityBox, {
    horizontal: true,
    done: ([x0, x1]) => change({ density: [10 ** densityScale.invert(x0), 10 ** densityScale.invert(x1)], max: null }),
  });
  brush(scatterBox, {
    done: ([x0, x1], [y0, y1]) => change({
      density: [10 ** dots.invertX(x0), 10 ** dots.invertX(x1)], max: [10 ** dots.invertY(y1), 10 ** dots.invertY(y0)],
    }),
    click: (x, y) => {
      const latent = dots.nearest(x, y);
      if (latent >= 0 && index.slot[latent] >= 0) location.href = latentAddress(latent, query);
    },
  });

  // The state: one object, written to the address; everything is drawn from it.
  function show() {
    order = select(index, query);
    if (input.value !== query.q) input.value = query.q;
    sortBox.value = query.sort;
    silentBox.checked = query.all;
    rangeChip.hidden = !query.density && !query.max;
    const pair = (range, write) => range.map(write).join(" – ");
    rangeChip.replaceChildren([
      query.density ? `density ${pair(query.density, format.percent)}` : "",
      query.max ? `max ${pair(query.max, (x) => format.number(x))}` : "",
    ].filter(Boolean).join(", "), make("span", { "aria-hidden": "true" }, " ×"));
    rangeChip.setAttribute("aria-label", "Remove the selected range");
    document.getElementById("matches").textContent =
      order.length === facts.n_latents ? `${format.count(order.length)} latents` : `${format.count(order.length)} of ${format.count(facts.n_latents)} latents`;
    document.getElementById("table").setAttribute("aria-rowcount", `${order.length + 1}`);
    document.getElementById("head").replaceChildren(...COLUMNS.map(({ name, sort, className }) => {
      const sorted = sort === query.sort ? (query.descending ? "descending" : "ascending") : "none";
      const title = make("div", { className: `cell ${className}`, role: "columnheader" });
      if (!sort) return title.append(name), title;
      title.setAttribute("aria-sort", sorted);
      const arrow = make("span", { className: "arrow", "aria-hidden": "true" }, sorted === "ascending" ? "↑" : sorted === "descending" ? "↓" : "");
      title.append(make("button", {
        onclick: () => change({ sort, descending: sort === query.sort ? !query.descending : SORTS[sort].descending }),
      }, name, arrow));
      return title;
    }));
    refill();
    drawDensity();
    drawScatter();
  }

  function change(part) {
    query = { ...query, ...part };
    history.replaceState(null, "", `#${writeQuery(query)}`);
    show();
  }

  input.addEventListener("input", () => change({ q: input.value }));
  sortBox.addEventListener("change", () => change({ sort: sortBox.value, descending: SORTS[sortBox.value].descending }));
  silentBox.addEventListener("change", () => change({ all: silentBox.checked }));
  rangeChip.addEventListener("click", () => change({ density: null, max: null }));
  addEventListener("hashchange", () => ((query = readQuery(location.hash)), show()));
  addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  addEventListener("resize", () => requestAnimationFrame(refill));
  addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== input) event.preventDefault(), input.focus(), input.select();
    if (event.key === "Escape" && document.activeElement === input) input.value ? change({ q: "" }) : input.blur();
    if (event.key === "Enter" && document.activeElement === input && order.length && index.slot[order[0]] >= 0)
      location.href = latentAddress(order[0], query);
  });
  show();
  document.body.classList.add("ready");
})().catch((error) => document.querySelector("main").prepend(make("p", { className: "message", role: "alert" }, error.message)));
