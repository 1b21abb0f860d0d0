"use strict";
// Elements of the pages, numbers as they are written, links past the head, and the box that follows the pointer.

/** An element with properties, attributes (by name with a dash, or role) and children; strings become text nodes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "style") for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const format = {
  count(n) {
    return n === null ? "–" : Math.round(n).toLocaleString("en");
  },
  short(n) {
    if (n === null) return "–";
    const steps = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];
    for (const [size, letter] of steps) if (Math.abs(n) >= size) return `${+(n / size).toPrecision(3)}${letter}`;
    return `${+n.toPrecision(3)}`;
  },
  /** With all its digits, so that a column of numbers stands straight. */
  number(x, digits = 3) {
    if (x === null) return "–";
    const size = Math.abs(x);
    if (x === 0) return "0";
    return size < 1e-3 ? x.toExponential(1) : size < 10 ** digits ? x.toPrecision(digits) : format.count(x);
  },
  percent(x) {
    if (x === null) return "–";
    if (x === 0 || x === 1) return `${100 * x} %`;
    return `${(100 * x).toPrecision(x >= 0.0995 ? 3 : 2)} %`;
  },
};

// A link past the head moves the focus alone: the address holds what the page shows.
for (const link of document.querySelectorAll(".skip"))
  link.addEventListener("click", (event) => {
    const target = document.querySelector(link.hash);
    event.preventDefault();
    target.tabIndex = -1;
    target.focus();
  });

/** A box that follows the pointer; `content` gives its children for an element, or null. */
function tooltip(root, selector, content) {
  const box = make("div", { className: "tooltip", role: "tooltip", hidden: true });
  document.body.append(box);
  const place = (x, y) => {
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
    box.style.top = `${y + height + 24 > innerHeight ? y - height - 10 : y + 18}px`;
  };
  root.addEventListener("pointerover", (event) => {
    const target = event.target.closest(selector);
    const children = target && content(target);
    box.hidden = !children;
    if (children) box.replaceChildren(...children), place(event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", () => (box.hidden = true));
  return { box, place };
}
