"use strict";
// Which latents, in which order: the state lives in the address, so that a view can be linked to and stepped through.

const SORTS = {
  latent: { name: "Number", descending: false },
  max: { name: "Max activation", descending: true },
  density: { name: "Density", descending: true },
  purity: { name: "Category purity", descending: true },
  mean: { name: "Mean activation", descending: true },
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
