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

// What went wrong last, until the list is what was asked for.
const say = (text) => (document.getElementById("message").textContent = text);
const fail = (error) => say(error.message);

(async () => {
  const [facts, overview] = await Promise.all([source.facts(), source.overview()]);
  const { fired } = overview;
  showHeader(facts, facts.n_latents - fired, overview.pages);
  document.body.classList.toggle("unlabelled", facts.categories.length === 0);

  let query = readQuery(location.hash);
  let view = { total: 0, listed: 0, chosen: [], dots: null, bars: overview.bars, rows: async () => [] };
  const input = document.getElementById("query");
  const sortBox = document.getElementById("sort");
  const silentBox = document.getElementById("all");
  const rangeChip = document.getElementById("range");
  const rows = document.getElementById("rows");
  for (const [key, { name }] of Object.entries(SORTS))
    if (key !== "purity" || facts.categories.length) sortBox.append(make("option", { value: key }, name));

  // The table: only the rows in sight exist.
  const live = new Map();

  function makeRow(one, place) {
    const { latent, count, category } = one;
    const link = !one.page || count === 0 ? make("span", {}, `${latent}`) : make("a", { href: latentAddress(latent, query) }, `${latent}`);
    const chips = (entries, className) => entries.map((entry) => make("span", { className }, tokenAlone(entry, { trim: className === "chip" })));
    const cell = (className, ...children) => make("div", { className: `cell ${className}`, role: "cell" }, ...children);
    const [low, high] = overview.density;
    const share = (Math.log10(count / facts.rows) - low) / (high - low);
    const bar = (value, className = "") => make("span", { className: `bar ${className}`, style: { "--v": Math.max(0, value).toFixed(3) } });
    const called = one.label === null ? [] : [make("span", { className: "called" }, one.label)];
    return make("div", { className: "row", role: "row", "aria-rowindex": `${place + 2}`, style: { top: `${place * height}px` } },
      cell("c-latent", link),
      cell("c-tokens", ...(one.page ? [...called, ...chips(one.tokens, "chip")] : [make("span", { className: "quiet" }, count ? "no page" : "")])),
      cell("c-density", ...(count ? [make("span", { className: "n" }, format.percent(count / facts.rows)), bar(share)] : [make("span", { className: "quiet" }, "silent")])),
      cell("c-max", ...(count ? [make("span", { className: "n" }, format.number(one.maximum))] : [])),
      cell("c-category", ...(count && category >= 0
        ? [make("span", { className: one.purity < 2 * chance(category) ? "name weak" : "name" }, facts.categories[category]), make("span", { className: "n" }, `${Math.round(100 * one.purity)} %`), bar(one.purity, "pure")]
        : [])),
      cell("c-promoted", ...(count ? chips(one.promoted, "word") : [])));
  }

  function chance(category) {
    return facts.category_rows[category] / facts.rows;
  }

  let height = 0; // of a row; asking the style for it costs a layout
  let asked = 0, answered = 0; // the number of the last question, and of the one whose answer is listed

  function paint() {
    const top = rows.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / height) - 6);
    const last = Math.max(first, Math.min(view.listed, Math.ceil((innerHeight - top) / height) + 6));
    for (const [place, row] of live) if (place < first || place >= last) row.remove(), live.delete(place);
    if (live.size === last - first) return;
    const shown = view;
    shown.rows(first, last).then((found) => {
      if (shown !== view) return; // another question was asked meanwhile
      const added = document.createDocumentFragment();
      found.forEach((one, i) => {
        if (live.has(first + i)) return;
        const row = makeRow(one, first + i);
        live.set(first + i, row);
        added.append(row);
      });
      rows.append(added);
      if (answered === asked) say("");
    }).catch(fail);
  }

  function refill() {
    height = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    live.clear();
    rows.replaceChildren();
    rows.style.height = `${Math.max(1, view.listed) * height}px`;
    if (!view.total) rows.append(make("p", { className: "nothing" }, "No latent matches."));
    paint();
  }

  // The distributions.
  const edges = overview.bars.map((_, i, { length }) => overview.density[0] + (i / length) * (overview.density[1] - overview.density[0]));
  edges.push(overview.density[1]);
  const densityBox = document.getElementById("density");
  const scatterBox = document.getElementById("scatter");
  const sum = (counts) => counts.reduce((a, b) => a + b, 0);
  let densityScale, dots, members; // members: latents of the dots
  const drawDensity = redraw(densityBox, () => {
    const brushBox = densityBox.querySelector(".brush");
    densityScale = bars(densityBox, {
      edges, counts: overview.bars, strong: sum(view.bars) < fired ? view.bars : null, marks: logTicks(...overview.density), scale: (n) => n, height: 220,
      title: (i) => `${format.percent(10 ** edges[i])} – ${format.percent(10 ** edges[i + 1])} of tokens: ${format.count(overview.bars[i])} latents`,
      label: `Histogram of the density of ${fired} latents that fired`,
    });
    if (brushBox) densityBox.append(brushBox);
  });
  const drawScatter = redraw(scatterBox, () => {
    const { density, maximum } = overview;
    const both = (key) => (view.dots ? [...overview.dots[key], ...view.dots[key]] : overview.dots[key]);
    members = both("latent");
    dots = scatter(scatterBox, {
      xs: both("density"), ys: both("maximum"), chosen: view.chosen, xMarks: logTicks(...density), yMarks: logTicks(...maximum),
      xRange: density, yRange: maximum, height: 220, label: "Density against maximal activation",
    });
  });
  tooltip(densityBox, ".target", (target) => [make("p", {}, target.dataset.title)]);
  const tip = tooltip(scatterBox, ".none", () => null);
  let over = -1; // the latent under the pointer
  scatterBox.addEventListener("pointermove", (event) => {
    const frame = scatterBox.getBoundingClientRect();
    const nearest = dots.nearest(event.clientX - frame.left, event.clientY - frame.top);
    const latent = nearest < 0 ? -1 : members[nearest];
    scatterBox.classList.toggle("over", latent >= 0);
    if (latent === over) {
      if (!tip.box.hidden) tip.place(event.clientX, event.clientY);
      return;
    }
    over = latent;
    tip.box.hidden = true;
    if (latent < 0) return;
    source.row(latent).then((one) => {
      if (over !== latent) return;
      tip.box.hidden = false;
      tip.box.replaceChildren(
        make("p", {}, make("b", {}, `${latent}`), ` fires on ${format.percent(one.count / facts.rows)}, up to ${format.number(one.maximum)}`),
        make("p", {}, ...one.tokens.map((entry) => make("span", { className: "chip" }, tokenAlone(entry, { trim: true })))));
      tip.place(event.clientX, event.clientY);
    }).catch(fail);
  });
  scatterBox.addEventListener("pointerleave", () => (over = -1));
  brush(densityBox, {
    horizontal: true,
    done: ([x0, x1]) => change({ density: [10 ** densityScale.invert(x0), 10 ** densityScale.invert(x1)], max: null }),
  });
  brush(scatterBox, {
    done: ([x0, x1], [y0, y1]) => change({
      density: [10 ** dots.invertX(x0), 10 ** dots.invertX(x1)], max: [10 ** dots.invertY(y1), 10 ** dots.invertY(y0)],
    }),
    click: async (x, y) => {
      const nearest = dots.nearest(x, y);
      if (nearest >= 0) open(await source.row(members[nearest]));
    },
  });

  // The state: one object, written to the address; everything is drawn from it.
  function open({ latent, page }) {
    if (page) location.href = latentAddress(latent, query);
  }

  async function show() {
    const mine = ++asked;
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
    const found = await source.select(query).catch((error) => {
      if (mine === asked) throw error;
    });
    if (mine !== asked) return;
    answered = mine;
    view = found;
    say("");
    const { total, listed } = view;
    document.getElementById("matches").textContent = [
      total === facts.n_latents ? `${format.count(total)} latents` : `${format.count(total)} of ${format.count(facts.n_latents)} latents`,
      listed < total ? `the first ${format.count(listed)} listed` : "",
    ].filter(Boolean).join(", ");
    document.getElementById("table").setAttribute("aria-rowcount", `${listed + 1}`);
    refill();
    drawDensity();
    drawScatter();
  }

  function change(part) {
    query = { ...query, ...part };
    history.replaceState(null, "", `#${writeQuery(query)}`);
    return show().catch(fail);
  }

  let waiting = 0;
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => change({ q: input.value }), source.patience);
  });
  sortBox.addEventListener("change", () => change({ sort: sortBox.value, descending: SORTS[sortBox.value].descending }));
  silentBox.addEventListener("change", () => change({ all: silentBox.checked }));
  rangeChip.addEventListener("click", () => change({ density: null, max: null }));
  addEventListener("hashchange", () => ((query = readQuery(location.hash)), show().catch(fail)));
  addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  addEventListener("resize", () => requestAnimationFrame(refill));
  addEventListener("keydown", async (event) => {
    if (event.key === "/" && document.activeElement !== input) event.preventDefault(), input.focus(), input.select();
    if (event.key === "Escape" && document.activeElement === input) input.value ? change({ q: "" }) : input.blur();
    if (event.key === "Enter" && document.activeElement === input) {
      clearTimeout(waiting);
      await change({ q: input.value });
      for (const first of await view.rows(0, Math.min(1, view.listed))) open(first);
    }
  });
  await show();
  document.body.classList.add("ready");
})().catch(fail);
