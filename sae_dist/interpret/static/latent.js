"use strict";

(async () => {
  const facts = await source.facts();
  const element = (id) => document.getElementById(id);
  const say = (error) => (element("message").textContent = error.message);
  document.body.classList.toggle("unlabelled", facts.categories.length === 0);

  let latent, query, row, current, tokens;
  let walk = null; // once it is known

  function readAddress() {
    const [, number, fields] = location.hash.match(/^#?(\d*)&?(.*)$/s);
    latent = Number(number);
    query = readQuery(fields);
  }

  async function show() {
    readAddress();
    const wanted = latent;
    element("message").textContent = "";
    walk = null;
    showWalk();
    source.walk(latent, query).then((found) => {
      if (wanted === latent) (walk = found), showWalk();
    }, () => {}); // the latent itself says what is wrong
    const found = await source.latent(latent);
    if (wanted !== latent) return;
    ({ row, record: current, tokens } = found);
    showHead();
    showContexts();
    drawHistogram();
    showOutputs();
    showCategories();
    await showSimilar();
    document.body.classList.add("ready");
  }

  // Where this latent is in the list that it was opened from.
  function showWalk() {
    const fields = writeQuery({ ...query, view: "aligned" });
    element("home").href = `index.html${fields ? "#" + fields : ""}`;
    const link = (id, there) => {
      if (there === null) element(id).removeAttribute("href");
      else element(id).href = latentAddress(there, query);
    };
    link("previous", walk?.previous ?? null);
    link("next", walk?.next ?? null);
    element("place").textContent = walk === null || walk.place < 0 ? "" :
      `${format.count(walk.place + 1)} of ${format.count(walk.total)}${query.q ? ` for ${query.q}` : ""}, by ${SORTS[query.sort].name.toLowerCase()}`;
  }

  function showHead() {
    const { count, category } = row;
    document.title = `Latent ${latent}`;
    element("kicker").textContent = [facts.summary.name, facts.summary.hook].filter((x) => typeof x === "string").join(" · ");
    element("number").textContent = `Latent ${latent}`;
    element("called").hidden = row.label === null;
    element("called").textContent = row.label;
    element("label").replaceChildren(...row.tokens.map((entry) => make("span", { className: "chip" }, tokenAlone(entry, { trim: true }))));
    const figures = [
      ["density", format.percent(count / facts.rows)],
      ["one token in", count ? format.count(facts.rows / count) : "–"],
      ["max activation", format.number(row.maximum)],
      ["mean when active", format.number(row.mean)],
    ];
    if (category >= 0 && count) figures.push([facts.categories[category], `${Math.round(100 * row.purity)} %`]);
    element("figures").replaceChildren(...figures.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))));
  }

  // Contexts.
  function readTokens(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return facts.token_bytes === 2 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
  }

  function showContexts() {
    const ids = readTokens(current.text);
    const [edges, counts] = current.intervals;
    const total = row.count;
    const n = counts.length;
    const groups = new Map([[-1, []]]);
    for (let interval = n - 1; interval >= 0; interval--) if (counts[interval]) groups.set(interval, []);
    let from = 0;
    for (const [interval, value, category, length, at, active] of current.contexts) {
      groups.get(interval).push({ value, category, at, active, ids: ids.slice(from, from + length) });
      from += length;
    }
    const title = (interval) => interval < 0 ? ["Strongest activations", ""] :
      [`${format.number(edges[interval])} – ${format.number(edges[interval + 1])}`,
        `part ${interval + 1} of ${n} of its range, ${format.count(counts[interval])} activations, ${format.percent(total ? counts[interval] / total : 0)}`];
    element("groups").replaceChildren(...[...groups].map(([interval, contexts]) => {
      const [name, note] = title(interval);
      return make("section", {}, make("h2", {}, name, make("span", { className: "note" }, note)), 
        contexts.length ? make("ol", {}, ...contexts.map(makeContext)) : make("p", { className: "nothing" }, "A sample of these is in sight above."));
    }));
    if (!total) element("groups").replaceChildren(make("p", { className: "nothing" }, "It was silent on the tokens that were looked at."));
    showView();
  }

  function makeContext({ value, category, at, active, ids }) {
    const entries = Array.from(ids, (id) => tokens[id]);
    const strength = new Map();
    for (let i = 0; i < active.length; i += 2) strength.set(active[i], active[i + 1]);
    const pieces = passage(entries).map((piece, i) => makeToken(piece, entries[i], strength.get(i) ?? 0, i === at));
    const button = make("button", { className: "value", "aria-expanded": "false", title: "Show in full" }, format.number(value));
    const item = make("li", { className: "context" }, button,
      make("div", { className: "text", dir: "auto" }, make("span", { className: "before" }, make("span", {}, ...pieces.slice(0, at))), make("span", { className: "after" }, ...pieces.slice(at))),
      make("span", { className: "from" }, category >= 0 ? facts.categories[category] : ""));
    button.addEventListener("click", () => button.setAttribute("aria-expanded", `${item.classList.toggle("open")}`));
    return item;
  }

  function makeToken({ text, loose }, entry, value, peak) {
    const token = make("span", { className: "token" });
    if (value > 0) {
      const share = Math.min(1, value / row.maximum);
      token.classList.add("active");
      token.style.setProperty("--a", (0.1 + 0.9 * share).toFixed(3));
      token.dataset.value = value;
    }
    if (peak) token.classList.add("peak");
    if (Array.isArray(entry)) token.dataset.kind = entry[0];
    if (Array.isArray(entry) && entry[0] === "hex") token.dataset.bytes = entry[1].replace(/../g, "$& ").trim();
    if (loose.length) token.append(make("span", { className: "quiet byte" }, loose.join(" ")));
    if (text) token.append(...visible(text, true));
    else if (!loose.length) token.classList.add("sliver");
    return token;
  }

  tooltip(element("groups"), ".token", (token) => {
    const value = Number(token.dataset.value ?? 0);
    const lines = [make("p", {}, value ? `${format.number(value, 4)}, ${format.percent(value / row.maximum)} of its maximum` : "not active")];
    if (token.dataset.bytes) lines.push(make("p", { className: "note" }, `bytes ${token.dataset.bytes}, part of a character`));
    if (token.dataset.kind === "special") lines.push(make("p", { className: "note" }, "special token"));
    return lines;
  });

  function showView() {
    element("contexts").classList.toggle("aligned", query.view === "aligned");
    element("aligned").setAttribute("aria-pressed", `${query.view === "aligned"}`);
    element("full").setAttribute("aria-pressed", `${query.view === "full"}`);
  }

  function setView(view) {
    query = { ...query, view };
    history.replaceState(null, "", latentAddress(latent, query));
    showWalk();
    showView();
  }

  // The aside.
  const drawHistogram = redraw(element("histogram"), () => {
    if (!current) return;
    const [bound, counts] = current.histogram;
    const used = counts.findLastIndex((count) => count > 0) + 1;
    if (!used) {
      element("histogram").replaceChildren(make("p", { className: "nothing" }, "No activations."));
      return;
    }
    const edges = Array.from({ length: used + 1 }, (_, i) => (bound * i) / counts.length);
    bars(element("histogram"), {
      edges, counts: counts.slice(0, used), height: 130, scale: (n) => Math.log1p(n),
      marks: ticks(0, edges[used], 5).map((v) => [v, format.short(v)]),
      fill: (i) => 0.25 + 0.75 * ((i + 0.5) / used),
      title: (i) => `${format.number(edges[i])} – ${format.number(edges[i + 1])}: ${format.count(counts[i])} tokens`,
      label: `Histogram of ${row.count} activations, counts on a logarithmic scale`,
    });
  });
  tooltip(element("histogram"), ".target", (target) => [make("p", {}, target.dataset.title)]);

  function showOutputs() {
    if (facts.no_outputs !== null) {
      element("outputs").replaceChildren(make("h2", {}, "Output tokens"), make("p", { className: "nothing" }, `Not measured: ${facts.no_outputs}.`));
      return;
    }
    const largest = Math.max(...current.promoted[1], ...current.suppressed[1].map(Math.abs), 1e-12);
    const list = ([ids, values]) => ids.map((id, i) => make("li", { style: { "--v": (Math.abs(values[i]) / largest).toFixed(3) } },
      make("span", { className: "word" }, tokenAlone(tokens[id])), make("span", { className: "n" }, values[i].toFixed(2).replace("-", "−"))));
    element("promoted").replaceChildren(...list(current.promoted));
    element("suppressed").replaceChildren(...list(current.suppressed));
  }

  function showCategories() {
    element("kinds").hidden = facts.categories.length === 0;
    element("categories").replaceChildren(...current.categories.map(([category, share, count]) => {
      const chance = facts.category_rows[category] / facts.rows;
      return make("li", { title: `${format.count(count)} activations; ${format.percent(chance)} of all tokens are ${facts.categories[category]}` },
        make("a", { className: "word", href: `index.html#q=${encodeURIComponent(`cat:"${facts.categories[category]}"`)}&sort=purity` }, facts.categories[category]),
        make("span", { className: "track", style: { "--v": share.toFixed(4), "--chance": chance.toFixed(4) } }),
        make("span", { className: "n" }, format.percent(share)));
    }));
  }

  /** Feature data has no similar latents: null. */
  async function showSimilar() {
    element("alike").hidden = current.similar === null;
    const [latents, cosines] = current.similar ?? [[], []];
    const others = await Promise.all(latents.map(source.row));
    element("similar").replaceChildren(...others.map((other, i) => {
      const words = other.tokens.slice(0, 4).map((entry) => make("span", { className: "chip" }, tokenAlone(entry, { trim: true })));
      return make("li", {}, other.page ? make("a", { href: latentAddress(other.latent, query) }, `${other.latent}`) : make("span", {}, `${other.latent}`),
        make("span", { className: "words" }, ...words), make("span", { className: "n" }, cosines[i].toFixed(2).replace("-", "−")));
    }));
  }

  element("aligned").addEventListener("click", () => setView("aligned"));
  element("full").addEventListener("click", () => setView("full"));
  addEventListener("hashchange", () => (scrollTo(0, 0), show().catch(say)));
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.key === "ArrowLeft") element("previous").click();
    if (event.key === "ArrowRight") element("next").click();
    if (event.key === "Escape") element("home").click();
  });
  await show().catch(say);
})().catch((error) => (document.getElementById("message").textContent = error.message));
