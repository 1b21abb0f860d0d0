"use strict";
// Loads the data files that lie beside a page.

/** Data files call saePages.receive(name, value); pages opened from disk may load scripts but not fetch. */
const saePages = (() => {
  const loads = new Map();

  function load(name) {
    if (!loads.has(name)) {
      const slot = {};
      slot.promise = new Promise((resolve, reject) => {
        slot.resolve = resolve;
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onerror = () => reject(new Error(`data/${name}.js is missing beside this page`));
        script.onload = () => script.remove();
        document.head.append(script);
      });
      loads.set(name, slot);
    }
    return loads.get(name).promise;
  }

  return { load, receive: (name, value) => loads.get(name).resolve(value) };
})();
