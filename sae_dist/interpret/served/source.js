"use strict";
// What the pages ask for, answered by the server of feature data. static/source.js says what each answer is.

const source = (() => {
  async function ask(path, fields = "") {
    const answer = await fetch(`data/${path}${fields ? `?${fields}` : ""}`).catch(() => {
      throw new Error("The server does not answer.");
    });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    return answer.json();
  }

  /** Asks once for each of the last so many paths. */
  function kept(limit) {
    const answers = new Map();
    return (path, fields) => {
      const address = `${path}?${fields ?? ""}`;
      if (!answers.has(address)) {
        const answer = ask(path, fields);
        answers.set(address, answer);
        answer.catch(() => answers.delete(address));
        if (answers.size > limit) answers.delete(answers.keys().next().value);
      }
      return answers.get(address);
    };
  }

  const once = kept(8);
  const rowOf = kept(500);
  const BLOCK = 100; // rows of the list that are asked for together

  return {
    patience: 200,
    facts: () => once("facts"),
    overview: () => once("overview"),

    async select(query) {
      const fields = writeQuery({ ...query, view: "aligned" });
      const [all, { total, listed, bars, dots, rows }] = await Promise.all([once("overview"), ask("selection", fields)]);
      const blocks = new Map([[0, Promise.resolve(rows)]]);
      const block = (i) => {
        if (!blocks.has(i)) {
          const asked = ask("rows", `${fields ? fields + "&" : ""}from=${i * BLOCK}&to=${Math.min((i + 1) * BLOCK, listed)}`);
          blocks.set(i, asked);
          asked.catch(() => blocks.delete(i));
        }
        return blocks.get(i);
      };
      const before = all.dots.latent.length;
      const everything = bars.reduce((a, b) => a + b, 0) === all.fired; // then both samples are the same
      return {
        total, listed, bars, dots: everything ? null : dots,
        chosen: everything ? all.dots.latent.map((_, i) => i) : dots.latent.map((_, i) => before + i),
        async rows(from, to) {
          if (to <= from) return [];
          const first = Math.floor(from / BLOCK);
          const parts = [];
          for (let i = first; i * BLOCK < to; i++) parts.push(block(i));
          return (await Promise.all(parts)).flat().slice(from - first * BLOCK, to - first * BLOCK);
        },
      };
    },

    walk: (latent, query) => ask(`walk/${latent}`, writeQuery({ ...query, all: false, view: "aligned" })),
    row: (latent) => rowOf(`row/${latent}`),
    latent: (latent) => ask(`latents/${latent}`),
  };
})();
