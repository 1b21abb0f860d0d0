"use strict";
// Plots: bars as SVG, the scatter on a canvas. Both draw again when their width or the colour scheme changes.

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round values between low and high, about n of them. */
function ticks(low, high, n) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function power10(exponent) {
  const digits = [...`${Math.abs(exponent)}`].map((d) => SUPERSCRIPT[d]).join("");
  return `10${exponent < 0 ? "⁻" : ""}${digits}`;
}

/** Whole powers of ten on a log10 axis, with values between them when they are few. */
function logTicks(low, high) {
  const whole = ticks(Math.ceil(low), Math.floor(high), 6).filter(Number.isInteger).map((e) => [e, power10(e)]);
  if (whole.length > 2) return whole;
  const found = [];
  const between = high - low < 0.7 ? [1, 1.5, 2, 3, 4, 5, 7] : [1, 2, 5];
  for (let e = Math.floor(low); e <= high; e++)
    for (const m of between) {
      const x = e + Math.log10(m);
      if (low <= x && x <= high) found.push([x, format.short(m * 10 ** e)]);
    }
  return found;
}

function redraw(holder, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (holder.clientWidth && holder.clientWidth !== width) draw((width = holder.clientWidth));
  }).observe(holder);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => width && draw(width));
  return () => width && draw(width);
}

/** Axis along the bottom of an SVG plot. */
function bottomAxis(marks, x, height) {
  return marks.map(([value, text]) =>
    svg("g", { transform: `translate(${x(value)},${height})`, class: "axis" },
      svg("line", { y2: 4 }), svg("text", { y: 16, "text-anchor": "middle" }, text)));
}

/** Bars of counts[i] on [edges[i], edges[i + 1]), heights by the law `scale`; `strong` counts are drawn over them. */
function bars(holder, { edges, counts, strong = null, marks, scale, height, fill = null, title, label }) {
  const width = holder.clientWidth;
  const left = 2, right = 2, bottom = 20;
  const x = (v) => left + ((v - edges[0]) / (edges[edges.length - 1] - edges[0])) * (width - left - right);
  const top = Math.max(...counts, 1);
  const y = (count) => (count > 0 ? Math.max(1.5, (scale(count) / scale(top)) * (height - bottom - 8)) : 0);
  const plot = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const gap = (x(edges[1]) - x(edges[0])) > 4 ? 1 : 0;
  const bar = (count, i, className) => {
    const rect = svg("rect", {
      x: x(edges[i]), width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - gap), y: height - bottom - y(count),
      height: y(count), rx: gap ? 1 : 0, class: className,
    });
    if (fill) rect.style.setProperty("--a", fill(i).toFixed(2));
    return rect;
  };
  plot.append(svg("line", { x1: 0, x2: width, y1: height - bottom + 0.5, y2: height - bottom + 0.5, class: "ground" }));
  counts.forEach((count, i) => {
    if (!count) return;
    plot.append(bar(count, i, strong ? "bar weak" : fill ? "bar heat" : "bar"));
    if (strong?.[i]) plot.append(bar(strong[i], i, "bar"));
  });
  const targets = svg("g", {});
  counts.forEach((count, i) => {
    const target = svg("rect", {
      x: x(edges[i]), width: x(edges[i + 1]) - x(edges[i]), y: 0, height: height - bottom, class: "target",
    });
    target.dataset.title = title(i);
    targets.append(target);
  });
  plot.append(targets, ...bottomAxis(marks.filter(([v]) => x(v) > 8 && x(v) < width - 8), x, height - bottom));
  holder.replaceChildren(plot);
  return { x, invert: (px) => edges[0] + ((px - left) / (width - left - right)) * (edges[edges.length - 1] - edges[0]) };
}

/** Let the pointer drag a rectangle over `holder`; calls done([x0, x1], [y0, y1]) in its pixels, or click(x, y). */
function brush(holder, { done, click, horizontal = false }) {
  const box = make("div", { className: "brush", hidden: true });
  let start = null;
  const at = (event) => {
    const frame = holder.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top].map((v, i) =>
      Math.max(0, Math.min(v, i ? frame.height : frame.width)));
  };
  const span = (event) => at(event).map((v, i) => [Math.min(v, start[i]), Math.max(v, start[i])]);
  holder.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch") return;
    start = at(event);
    holder.append(box);
    holder.setPointerCapture(event.pointerId);
  });
  holder.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [[x0, x1], [y0, y1]] = span(event);
    box.hidden = x1 - x0 < 4;
    box.style.left = `${x0}px`;
    box.style.width = `${x1 - x0}px`;
    box.style.top = horizontal ? "0" : `${y0}px`;
    box.style.height = horizontal ? "100%" : `${y1 - y0}px`;
  });
  holder.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [xs, ys] = span(event);
    start = null;
    box.hidden = true;
    if (xs[1] - xs[0] >= 4) done(xs, ys);
    else click?.(xs[0], ys[0]);
  });
  holder.addEventListener("pointercancel", () => ((start = null), (box.hidden = true)));
}

/** Dots at (xs, ys), those of `chosen` strong. Returns the nearest dot to a pixel and the axes' inverses. */
function scatter(holder, { xs, ys, chosen, xMarks, yMarks, xRange, yRange, height, label }) {
  const width = holder.clientWidth;
  const [left, right, top, bottom] = [38, 6, 8, 20];
  const ratio = devicePixelRatio || 1;
  const canvas = make("canvas", { width: width * ratio, height: height * ratio, role: "img", "aria-label": label });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const x = (v) => left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (width - left - right);
  const y = (v) => height - bottom - ((v - yRange[0]) / (yRange[1] - yRange[0])) * (height - top - bottom);
  const context = canvas.getContext("2d");
  const css = getComputedStyle(holder);
  const color = (name) => css.getPropertyValue(name).trim();
  context.scale(ratio, ratio);
  context.font = `11px ${css.fontFamily}`;
  context.fillStyle = color("--quiet");
  context.strokeStyle = color("--line");
  context.lineWidth = 1;
  const line = (x0, y0, x1, y1) => (context.beginPath(), context.moveTo(x0, y0), context.lineTo(x1, y1), context.stroke());
  for (const [v, text] of yMarks) {
    const at = Math.round(y(v)) + 0.5;
    line(left, at, width - right, at);
    context.textAlign = "right";
    context.fillText(text, left - 6, at + 4);
  }
  for (const [v, text] of xMarks) {
    const at = Math.round(x(v)) + 0.5;
    line(at, height - bottom, at, height - bottom + 4);
    context.textAlign = "center";
    context.fillText(text, at, height - bottom + 16);
  }
  const n = Math.max(1, xs.length);
  const radius = n > 20000 ? 1.1 : n > 5000 ? 1.5 : 2;
  const strength = Math.max(0.16, Math.min(0.75, 60 / Math.sqrt(n)));
  const dots = (members, alpha, name) => {
    context.globalAlpha = alpha;
    context.fillStyle = color(name);
    for (const i of members) {
      context.beginPath();
      context.arc(x(xs[i]), y(ys[i]), radius, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
  };
  const drawn = [...xs.keys()].filter((i) => Number.isFinite(xs[i]) && Number.isFinite(ys[i]));
  const all = chosen.length >= drawn.length;
  if (!all) dots(drawn, 0.35 * strength, "--quiet");
  dots(chosen.filter((i) => Number.isFinite(xs[i])), all ? strength : Math.max(0.5, strength), "--accent");
  holder.querySelector("canvas")?.remove();
  holder.prepend(canvas);
  return {
    x, y,
    invertX: (px) => xRange[0] + ((px - left) / (width - left - right)) * (xRange[1] - xRange[0]),
    invertY: (py) => yRange[0] + ((height - bottom - py) / (height - top - bottom)) * (yRange[1] - yRange[0]),
    nearest(px, py) {
      let best = -1, least = 12 ** 2;
      for (const i of chosen) {
        const distance = (x(xs[i]) - px) ** 2 + (y(ys[i]) - py) ** 2;
        if (distance < least) [best, least] = [i, distance];
      }
      return best;
    },
  };
}
