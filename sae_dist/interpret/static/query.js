"use strict";
// Which latents, in which order: the state lives in the address, so that a view can be linked to and stepped through.

const SORTS = {
  latent: { name: "Number", descending: false, key: (index) => index.count.map((_, i) => i) },
  max: { name: "Max activation", descending: true, key: (index) => index.maximum },
  density: { name: "Density", descending: true, key: (index) => index.count },
  purity: { name: "Category purity", descending: true, key: (index) => index.purity },
  mean: { name: "Mean activation", descending: true, key: (index) => index.mean },
};

/** {q, sort, descending, all, density: [low, high], max: [low, high], view} from an address's fragment. */
function readQuery(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const sort = Object.hasOwn(SORTS, fields.get("sort")) ? fields.get("sort") : "latent";
  const range = (name) => {
    const ends = (fields.get(name) ?? "").split("..").map(Number);
    return ends.length === 2 && ends.every(Number.isFinite) && fields.get(name) !== "" ? ends : null;
  };
  const direction = fields.get("dir");
  return {
    q: fields.get("q") ?? "",
    sort,
    descending: direction === null ? SORTS[sort].descending : direction === "desc",
    all: fields.get("all") === "1",
    density: range("d"),
    max: range("m"),
    view: fields.get("view") === "full" ? "full" : "aligned",
  };
}

function writeQuery(query) {
  const fields = new URLSearchParams();
  if (query.q) fields.set("q", query.q);
  if (query.sort !== "latent") fields.set("sort", query.sort);
  if (query.descending !== SORTS[query.sort].descending) fields.set("dir", query.descending ? "desc" : "asc");
  if (query.all) fields.set("all", "1");
  if (query.density) fields.set("d", query.density.map((x) => +x.toPrecision(4)).join(".."));
  if (query.max) fields.set("m", query.max.map((x) => +x.toPrecision(4)).join(".."));
  if (query.view === "full") fields.set("view", "full");
  return fields.toString();
}

function latentAddress(latent, query) {
  const fields = writeQuery(query);
  return `latent.html#${latent}${fields ? "&" + fields : ""}`;
}

/** The table with what search needs: the place of each latent's page, and lower-case text, made when first asked for. */
function makeIndex(columns, facts, tokens) {
  const slot = new Int32Array(facts.n_latents).fill(-1);
  if (columns.paged) columns.paged.forEach((latent, i) => (slot[latent] = i));
  else slot.forEach((_, i) => (slot[i] = i));
  const lower = (ids) => ids.map((id) => searchable(tokens[id]).toLowerCase());
  const cache = new Map();
  const text = (latent) => {
    if (!cache.has(latent)) {
      const page = slot[latent];
      const category = columns.category[latent];
      cache.set(latent, {
        tokens: page < 0 ? [] : lower(columns.tokens[page]),
        promoted: page < 0 ? [] : lower(columns.promoted[page]),
        category: category < 0 || columns.count[latent] === 0 ? "" : facts.categories[category].toLowerCase(),
      });
    }
    return cache.get(latent);
  };
  return { ...columns, slot, text, n: facts.n_latents, rows: facts.rows };
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

/** Numbers of the latents that match, sorted. */
function select(index, query) {
  const tests = parseSearch(query.q);
  const inside = (range, x) => !range || (range[0] <= x && x <= range[1]);
  const chosen = [];
  for (let latent = 0; latent < index.n; latent++) {
    if (!query.all && (index.count[latent] === 0 || index.slot[latent] < 0)) continue;
    if (!inside(query.density, index.count[latent] / index.rows) || !inside(query.max, index.maximum[latent])) continue;
    if (tests.length) {
      const text = index.text(latent);
      if (!tests.every((test) => test(text, latent))) continue;
    }
    chosen.push(latent);
  }
  const key = SORTS[query.sort].key(index);
  const sign = query.descending ? -1 : 1;
  return chosen.sort((a, b) => sign * (key[a] - key[b]) || a - b);
}
