"use strict";
// What the pages ask for, answered from the data files that lie beside them. A server answers the same questions for
// dictionaries whose list is too long for a browser.

/** All latents: their columns, the place of each one's page, rows of the list, and which latents a query chooses. */
function makeTable([facts, tokens, columns]) {
  const n = facts.n_latents;
  const slot = new Int32Array(n).fill(-1);
  if (columns.paged) columns.paged.forEach((latent, i) => (slot[latent] = i));
  else slot.forEach((_, i) => (slot[i] = i));
  const entries = (ids) => ids.map((id) => tokens[id]);
  const row = (latent) => ({
    latent, label: null, page: slot[latent] >= 0, count: columns.count[latent], maximum: columns.maximum[latent],
    mean: columns.mean[latent], category: columns.category[latent], purity: columns.purity[latent],
    tokens: slot[latent] < 0 ? [] : entries(columns.tokens[slot[latent]]),
    promoted: slot[latent] < 0 ? [] : entries(columns.promoted[slot[latent]]),
  });

  const lower = (ids) => entries(ids).map((entry) => searchable(entry).toLowerCase());
  const texts = new Map(); // lower-case text by latent, made when first asked for
  const text = (latent) => {
    if (!texts.has(latent)) {
      const category = columns.category[latent];
      texts.set(latent, {
        tokens: slot[latent] < 0 ? [] : lower(columns.tokens[slot[latent]]),
        promoted: slot[latent] < 0 ? [] : lower(columns.promoted[slot[latent]]),
        category: category < 0 || columns.count[latent] === 0 ? "" : facts.categories[category].toLowerCase(),
      });
    }
    return texts.get(latent);
  };
  const keys = { latent: columns.count.map((_, i) => i), max: columns.maximum, density: columns.count, purity: columns.purity, mean: columns.mean };

  /** Numbers of the latents that match, sorted. */
  function select(query) {
    const tests = parseSearch(query.q);
    const inside = (range, x) => !range || (range[0] <= x && x <= range[1]);
    const chosen = [];
    for (let latent = 0; latent < n; latent++) {
      if (!query.all && (columns.count[latent] === 0 || slot[latent] < 0)) continue;
      if (!inside(query.density, columns.count[latent] / facts.rows) || !inside(query.max, columns.maximum[latent])) continue;
      if (tests.length) {
        const words = text(latent);
        if (!tests.every((test) => test(words, latent))) continue;
      }
      chosen.push(latent);
    }
    const key = keys[query.sort];
    const sign = query.descending ? -1 : 1;
    return chosen.sort((a, b) => sign * (key[a] - key[b]) || a - b);
  }
  return { facts, tokens, columns, slot, row, select };
}

/** Tests of (text, latent), all of which must hold. */
function parseSearch(q) {
  const words = q.toLowerCase().match(/(?:cat:|promotes:)?"[^"]*"?|\S+/g) ?? [];
  return words.map((word) => {
    const [, field, quoted, plain] = word.match(/^(cat:|promotes:)?(?:"([^"]*)"?|(.*))$/s);
    const whole = quoted !== undefined;
    const wanted = whole ? quoted.trim() : plain;
    const among = (texts) => texts.some((t) => (whole ? t.trim() === wanted : t.includes(wanted)));
    if (field === "cat:") return (text) => among([text.category]);
    if (field === "promotes:") return (text) => among(text.promoted);
    const number = /^#?(\d+)$/.exec(wanted)?.[1];
    return (text, latent) =>
      among(text.tokens) || (!whole && (text.category.includes(wanted) || (number && `${latent}` === number)));
  });
}

/** Where latents lie in the plots: densities and maxima as logarithms to the base of 10, and ranges with some room. */
function makePlots({ facts, columns }) {
  const density = columns.count.map((n) => (n > 0 ? Math.log10(n / facts.rows) : -Infinity));
  const maximum = columns.maximum.map((x) => (x > 0 ? Math.log10(x) : -Infinity));
  const span = (values) => {
    const [low, high] = values.filter(Number.isFinite).reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
    if (low > high) return [-1, 0];
    const room = Math.max(0.04 * (high - low), 0.05);
    return [low - room, high + room];
  };
  const range = span(density);
  const N_BARS = 60;
  const bars = (latents) => {
    const counts = new Array(N_BARS).fill(0);
    for (const latent of latents)
      if (Number.isFinite(density[latent]))
        counts[Math.min(N_BARS - 1, Math.floor(((density[latent] - range[0]) / (range[1] - range[0])) * N_BARS))]++;
    return counts;
  };
  return { dots: { latent: columns.count.map((_, i) => i), density, maximum }, density: range, maximum: span(maximum), bars };
}

const source = (() => {
  let loaded = null;
  const load = () => (loaded ??= Promise.all(["summary", "tokens", "index"].map(saePages.load)).then(makeTable));
  let drawn = null;
  const plots = async () => (drawn ??= makePlots(await load()));

  return {
    patience: 0, // milliseconds to wait for more letters of a search

    /** What the pages of all latents show or reckon with. */
    facts: async () => (await load()).facts,

    /** The plots of all latents: `dots`, the ranges of their densities and maxima, and `bars`, counts by density. */
    async overview() {
      const { columns } = await load();
      const { dots, density, maximum, bars } = await plots();
      return {
        dots, density, maximum, bars: bars(columns.count.keys()),
        fired: columns.count.filter((n) => n > 0).length, pages: columns.tokens.length,
      };
    },

    /** What a query chooses: how many, how many of them are listed, rows of the list, their bars, and their dots as
     *  places in those of all latents and then `dots`. */
    async select(query) {
      const { select, row } = await load();
      const order = select(query);
      return {
        total: order.length, listed: order.length, chosen: order, dots: null, bars: (await plots()).bars(order),
        rows: async (from, to) => order.slice(from, to).map(row),
      };
    },

    /** Where a latent is in the list of a query, -1 for nowhere, and its neighbours there. */
    async walk(latent, query) {
      const { select, slot } = await load();
      const order = select({ ...query, all: false }).filter((i) => slot[i] >= 0);
      const place = order.indexOf(latent);
      return { place, total: order.length, previous: order[place - 1] ?? null, next: order[place + 1] ?? null };
    },

    /** A latent's row of the list. */
    row: async (latent) => (await load()).row(latent),

    /** Its row, its record, and the table of tokens that the record numbers. */
    async latent(latent) {
      const { facts, tokens, slot, row } = await load();
      if (latent >= facts.n_latents) throw new Error(`There is no latent ${latent}.`);
      const page = slot[latent];
      if (page < 0) throw new Error(`Latent ${latent} has no page: only a sample of the dictionary was looked at.`);
      const records = await saePages.load(`latents-${Math.floor(page / facts.latents_per_file)}`);
      return { row: row(latent), record: records[page % facts.latents_per_file], tokens };
    },
  };
})();
