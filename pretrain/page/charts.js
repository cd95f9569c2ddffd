"use strict";
// Draws charts out of the JSON in #data; report.js says which. Text of a run only ever becomes textContent.
window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const PHASE_COLOURS = {
  "data wait": "--c1", forward: "--c0", backward: "--c5", optimizer: "--c2", checkpoint: "--c6", eval: "--c3",
  other: "--c7", "the rest of the step": "--c0",
};
const view = { x: "tokens", hidden: new Set() };
const charts = [];

// ---- small helpers ----

const colour = (index) => `var(--c${index % 8})`;
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function node(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "path", "line", "rect", "circle", "text", "clipPath", "defs", "title"].includes(tag);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function figure(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return Number(value.toPrecision(4)).toString();
}

function compact(value) {
  const size = Math.abs(value);
  for (const [unit, mark] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return `${Number((value / unit).toPrecision(4))}${mark}`;
  return size !== 0 && size < 1e-3 ? value.toExponential(0) : `${Number(value.toPrecision(4))}`;
}

function span(hours) {
  if (!isNumber(hours)) return "–";
  const seconds = Math.round(Math.abs(hours) * 3600);
  const sign = hours < 0 ? "−" : "";
  if (seconds < 90) return `${sign}${seconds} s`;
  if (seconds < 5400) return `${sign}${Number((seconds / 60).toFixed(1))} min`;
  if (seconds < 172800) return `${sign}${Number((seconds / 3600).toFixed(2))} h`;
  return `${sign}${Number((seconds / 86400).toFixed(2))} d`;
}

const AXES = {
  tokens: { title: "tokens", tick: compact, head: (value) => `${Math.round(value).toLocaleString("en")} tokens` },
  step: { title: "step", tick: compact, head: (value) => `step ${Math.round(value).toLocaleString("en")}` },
  hours: { title: "time since the start", tick: span, head: span },
  seconds: { title: "seconds before the end", tick: (v) => `${Number(v.toFixed(1))} s`, head: (v) => `${v.toFixed(2)} s` },
};

function ticksOf(low, high, count, steps = [1, 2, 2.5, 5, 10]) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = steps.find((each) => each * power >= rough * 0.999) * power;
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) ticks.push(at * step);
  return ticks;
}

function timeTicks(low, high, count) {
  const units = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
  const wanted = ((high - low) * 3600) / Math.max(count, 1);
  const unit = units.find((each) => each >= wanted);
  if (!unit) return ticksOf(low / 24, high / 24, count).map((days) => days * 24);
  const ticks = [];
  for (let at = Math.ceil((low * 3600) / unit - 1e-9); at * unit <= high * 3600 + 1e-6; at++) ticks.push((at * unit) / 3600);
  return ticks;
}

function logTicks(low, high, count) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  for (const marks of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = from; power <= to; power++) for (const mark of marks) ticks.push(mark * 10 ** power);
    const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    if (inside.length >= 2 && inside.length <= count + 2) return inside;
  }
  const linear = ticksOf(low, high, count).filter((tick) => tick > 0);
  return linear.length > 1 ? linear : [low, high];
}

function nearest(values, wanted) {
  let best = 0, distance = Infinity;
  values.forEach((value, at) => {
    if (isNumber(value) && Math.abs(value - wanted) < distance) [best, distance] = [at, Math.abs(value - wanted)];
  });
  return best;
}

// ---- a chart: its frame, axes and read-out ----

class Chart {
  constructor(id, title, options) {
    Object.assign(this, { id, options: { height: 230, x: null, ...options } });
    this.log = false;
    this.caption = node("figcaption", {}, node("h3", {}, title));
    if (options.unit) this.caption.append(node("span", { class: "unit" }, options.unit));
    this.body = node("div");
    this.keys = node("div", { class: "keys" });
    this.tip = node("div", { class: "tip" });
    this.root = node("figure", { class: `chart ${options.size || ""}`, id: `chart-${id}` }, this.caption, this.body, this.keys, this.tip);
    if (options.canLog) this.addLogSwitch();
    document.getElementById("charts").append(this.root);
    charts.push(this);
  }

  addLogSwitch() {
    const buttons = ["linear", "log"].map((word) => node("button", { "aria-pressed": `${word === "linear"}` }, word));
    buttons.forEach((button, index) => button.addEventListener("click", () => {
      this.log = index === 1;
      buttons.forEach((other, at) => other.setAttribute("aria-pressed", `${at === index}`));
      this.draw();
    }));
    this.caption.append(node("div", { class: "switch", role: "group", "aria-label": "vertical axis" }, ...buttons));
  }

  get axis() { return this.options.x || view.x; }

  frame(xRange, yRange, { yTick = compact, height = this.options.height } = {}) {
    const width = Math.max(this.body.clientWidth || 400, 220);
    this.box = { left: this.options.left || 52, right: width - 12, top: 8, bottom: height - 26, width, height };
    const { left, right, top, bottom } = this.box;
    const [low, high] = xRange, [floor, ceiling] = yRange;
    this.sx = (value) => left + ((value - low) / (high - low || 1)) * (right - left);
    this.ux = (pixel) => low + ((pixel - left) / (right - left)) * (high - low);
    const scale = this.log ? Math.log10 : (value) => value;
    this.sy = (value) => bottom - ((scale(value) - scale(floor)) / (scale(ceiling) - scale(floor) || 1)) * (bottom - top);
    this.svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": this.caption.textContent });
    const clip = `clip-${this.id}`;
    this.svg.append(node("defs", {}, node("clipPath", { id: clip }, node("rect", { x: left, y: top - 2, width: right - left + 2, height: bottom - top + 4 }))));
    const count = Math.max(Math.floor((bottom - top) / 42), 2);
    if (yTick) for (const tick of this.log ? logTicks(floor, ceiling, count + 2) : ticksOf(floor, ceiling, count)) {
      const y = this.sy(tick);
      this.svg.append(node("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }));
      this.svg.append(node("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, yTick(tick)));
    }
    const make = this.axis === "hours" ? timeTicks : ticksOf;
    for (const tick of make(low, high, Math.max(Math.floor((right - left) / 78), 2))) {
      const x = this.sx(tick);
      const anchor = x > right - 24 ? "end" : x < left + 12 ? "start" : "middle";
      this.svg.append(node("line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      this.svg.append(node("text", { x, y: bottom + 17, "text-anchor": anchor }, AXES[this.axis].tick(tick)));
    }
    this.svg.append(node("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    this.plot = node("g", { "clip-path": `url(#${clip})` });
    this.cross = node("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
    this.dots = node("g");
    this.svg.append(this.plot, this.cross, this.dots);
    this.body.replaceChildren(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => charts.forEach((chart) => chart.clear()));
    this.svg.addEventListener("keydown", (event) => this.walk(event));
  }

  path(xs, ys) {
    let text = "", pen = false;
    for (let at = 0; at < xs.length; at++) {
      const usable = isNumber(xs[at]) && isNumber(ys[at]) && (!this.log || ys[at] > 0);
      if (usable) text += `${pen ? "L" : "M"}${this.sx(xs[at]).toFixed(1)} ${this.sy(ys[at]).toFixed(1)}`;
      pen = usable;
    }
    return text;
  }

  area(xs, lows, highs) {
    let text = "";
    const usable = (at) => isNumber(xs[at]) && isNumber(lows[at]) && isNumber(highs[at]) && (!this.log || lows[at] > 0);
    for (let at = 0; at < xs.length; at++) {
      if (!usable(at)) continue;
      const begin = at;
      while (at + 1 < xs.length && usable(at + 1)) at++;
      const points = [];
      for (let each = begin; each <= at; each++) points.push(`${this.sx(xs[each]).toFixed(1)} ${this.sy(highs[each]).toFixed(1)}`);
      for (let each = at; each >= begin; each--) points.push(`${this.sx(xs[each]).toFixed(1)} ${this.sy(lows[each]).toFixed(1)}`);
      text += `M${points.join("L")}Z`;
    }
    return text;
  }

  point(event) {
    const bounds = this.svg.getBoundingClientRect();
    const pixel = ((event.clientX - bounds.left) / bounds.width) * this.box.width;
    this.at = this.ux(Math.min(Math.max(pixel, this.box.left), this.box.right));
    this.readOut(this.at, event.clientX - bounds.left, event.clientY - bounds.top);
    for (const other of charts) if (other !== this && other.axis === this.axis && other.sx) other.mark(this.at);
  }

  walk(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.box) return;
    event.preventDefault();
    const { left, right } = this.box;
    const pixel = Math.min(Math.max((this.at === undefined ? left : this.sx(this.at)) + (step * (right - left)) / 60, left), right);
    this.at = this.ux(pixel);
    this.readOut(this.at, pixel, 20);
  }

  mark(value) {
    const x = this.sx(value);
    const inside = x >= this.box.left && x <= this.box.right;
    for (const [name, each] of [["x1", x], ["x2", x], ["visibility", inside ? "visible" : "hidden"]]) this.cross.setAttribute(name, each);
  }

  clear() {
    if (!this.cross) return;
    this.cross.setAttribute("visibility", "hidden");
    this.dots.replaceChildren();
    this.tip.style.display = "none";
  }

  readOut(value, x, y) {
    const rows = this.rowsAt(value);
    if (!rows.length) return this.clear();
    this.mark(rows[0].at ?? value);
    this.dots.replaceChildren(...rows.filter((row) => isNumber(row.y)).map((row) =>
      node("circle", { cx: this.sx(row.at), cy: this.sy(row.y), r: 3.5, style: { fill: row.colour, stroke: "var(--card)", strokeWidth: "1.5" } })));
    const head = rows[0].head || AXES[this.axis].head(rows[0].at ?? value);
    this.tip.replaceChildren(node("div", { class: "head" }, node("span", {}, head)), ...rows.filter((row) => row.text).map((row) =>
      node("div", {}, node("span", {}, node("i", { class: "key", style: { background: row.colour } }), row.label), node("span", {}, row.text))));
    this.tip.style.display = "block";
    const width = this.root.clientWidth, own = this.tip.offsetWidth;
    this.tip.style.left = `${x + own + 40 > width ? Math.max(x - own - 6, 4) : x + 30}px`;
    this.tip.style.top = `${y + 40}px`;
  }

  showKeys(keys) {
    this.keys.replaceChildren(...keys.map(([label, paint, square]) =>
      node("span", {}, node("i", { class: square ? "key square" : "key", style: { background: paint } }), label)));
  }

  finish() { this.root.dataset.drawn = "true"; }
}

// ---- kinds of charts ----

// lines: [{run, label, x, y, low, high, smooth, dots, dash}]
class LineChart extends Chart {
  visible() { return this.options.lines(this.axis).filter((line) => !view.hidden.has(line.run)); }

  ranges(lines) {
    let low = Infinity, high = -Infinity;
    const values = [];
    for (const line of lines) {
      for (const x of line.x) if (isNumber(x)) { low = Math.min(low, x); high = Math.max(high, x); }
      for (const list of [line.y, line.low || [], line.high || []])
        for (const y of list) if (isNumber(y) && (!this.log || y > 0)) values.push(y);
    }
    if (!values.length) return null;
    values.sort((a, b) => a - b);
    let floor = values[0], ceiling = values[values.length - 1];
    const usual = values[Math.floor(values.length * 0.985)];
    this.above = 0;
    if (this.options.clips && !this.log && ceiling > 2.5 * usual && usual > 0) {  // a spike must not flatten the rest
      this.above = ceiling;
      ceiling = usual * 1.4;
    }
    if (this.log) return [[low, high], [floor, ceiling === floor ? floor * 1.1 : ceiling]];
    if (this.options.fromZero) floor = Math.min(floor, 0);
    const room = (ceiling - floor) * 0.06 || Math.abs(ceiling) * 0.1 || 1;
    return [[low, high], [this.options.fromZero && floor === 0 ? 0 : floor - room, ceiling + room]];
  }

  draw() {
    const lines = this.lines = this.visible();
    const ranges = this.ranges(lines);
    if (!ranges) { this.body.replaceChildren(node("p", { class: "muted" }, "nothing to show")); return this.finish(); }
    this.frame(...ranges, { yTick: this.options.tick || compact });
    this.drawBands();
    this.drawRestarts(lines);
    for (const line of lines) if (line.low) this.plot.append(node("path", { d: this.area(line.x, line.low, line.high), style: { fill: line.colour, opacity: 0.16 } }));
    for (const line of lines) this.drawLine(line);
    if (this.above) this.svg.append(node("text", { x: this.box.right, y: this.box.top + 8, "text-anchor": "end" }, `▲ up to ${figure(this.above)}`));
    this.showKeys(this.legend(lines));
    this.finish();
  }

  drawLine(line) {
    const style = { stroke: line.colour, strokeWidth: line.smooth ? "1" : "1.6", opacity: line.smooth ? 0.35 : 1, strokeDasharray: line.dash || "none" };
    if (!line.onlyDots) this.plot.append(node("path", { class: "line", d: this.path(line.x, line.y), style }));
    if (line.smooth) this.plot.append(node("path", { class: "line", d: this.path(line.x, line.smooth), style: { stroke: line.colour, strokeWidth: "2" } }));
    if (line.dots || line.x.length === 1) line.x.forEach((x, at) => {
      if (!isNumber(x) || !isNumber(line.y[at]) || (this.log && line.y[at] <= 0)) return;
      this.plot.append(node("circle", { cx: this.sx(x), cy: this.sy(line.y[at]), r: 3.2, style: { fill: "var(--card)", stroke: line.colour, strokeWidth: "1.8" } }));
    });
  }

  drawRestarts(lines) {
    const { top, bottom } = this.box;
    for (const index of new Set(lines.map((line) => line.run))) for (const restart of RUNS[index].restarts) {
      const x = restart[this.axis];
      if (!isNumber(x)) continue;
      const style = RUNS.length > 1 ? { stroke: colour(index) } : {};
      this.plot.append(node("line", { class: "restart", x1: this.sx(x), x2: this.sx(x), y1: top, y2: bottom, style }));
    }
  }

  drawBands() {
    for (const band of this.options.bands || []) {
      const x = this.sx(band.from);
      this.plot.append(node("rect", { x, y: this.box.top, width: Math.max(this.sx(band.to) - x, 0.5), height: this.box.bottom - this.box.top,
        style: { fill: `var(${PHASE_COLOURS[band.phase] || "--c7"})`, opacity: 0.16 } }));
    }
  }

  legend(lines) {
    const keys = [];
    if (this.options.bands) for (const phase of new Set(this.options.bands.map((band) => band.phase)))
      keys.push([phase || "no phase", `color-mix(in srgb, var(${PHASE_COLOURS[phase] || "--c7"}) 35%, transparent)`, true]);
    const several = new Set(lines.map((line) => line.label)).size > 1 || this.options.alwaysKeys;
    if (several) for (const line of lines) keys.push([this.nameOf(line),
      line.dash ? `repeating-linear-gradient(90deg, ${line.colour} 0 4px, transparent 4px 6px)` : line.colour]);
    if (this.options.showsRestarts && lines.some((line) => RUNS[line.run].restarts.length)) keys.push(["dashed: resumed", "var(--muted)"]);
    return keys;
  }

  // Of one run its label, of several runs the run, or both where either alone is not enough.
  nameOf(line) {
    if (new Set(this.lines.map((each) => each.run)).size < 2) return line.label;
    const run = RUNS[line.run].name;
    return new Set(this.lines.map((each) => each.label)).size > 1 ? `${run}: ${line.label}` : run;
  }

  rowsAt(value) {
    const rows = [];
    for (const line of this.lines) {
      if (!line.x.length) continue;
      const at = nearest(line.x, value);
      const reach = Math.abs(this.ux(this.box.right) - this.ux(this.box.left)) * 0.02;
      if (!isNumber(line.x[at]) || (value > line.x[at] + reach && at === line.x.findLastIndex(isNumber))) continue;  // it ended before
      const y = (line.smooth || line.y)[at] ?? line.y[at];
      const format = this.options.format || figure;
      let text = format(line.y[at]);
      if (line.smooth && isNumber(line.smooth[at])) text += ` (smoothed ${format(line.smooth[at])})`;
      if (line.low && isNumber(line.low[at]) && line.low[at] !== line.high[at]) text += ` [${format(line.low[at])} – ${format(line.high[at])}]`;
      rows.push({ at: line.x[at], y, colour: line.colour, label: this.nameOf(line), text });
    }
    return rows;
  }
}

// the phases of one run, one upon the other
class StackChart extends Chart {
  draw() {
    const { phases } = this.options;
    const xs = phases[this.axis];
    const totals = xs.map((_, at) => phases.values.reduce((sum, list) => sum + (list[at] || 0), 0));
    const known = xs.filter(isNumber);
    const sorted = [...totals].sort((a, b) => a - b);
    const ceiling = Math.min(sorted[sorted.length - 1], sorted[Math.floor(sorted.length * 0.97)] * 1.5) || 1;
    this.frame([known[0], known[known.length - 1]], [0, ceiling * 1.05]);
    let below = xs.map(() => 0);
    phases.values.forEach((list, index) => {
      const above = below.map((base, at) => base + (list[at] || 0));
      this.plot.append(node("path", { d: this.area(xs, below, above), style: { fill: this.paint(index), opacity: 0.85 } }));
      below = above;
    });
    this.showKeys(phases.names.map((name, index) => [name, this.paint(index), true]));
    this.finish();
  }

  paint(index) { return `var(${PHASE_COLOURS[this.options.phases.names[index]] || `--c${index % 8}`})`; }

  rowsAt(value) {
    const { phases } = this.options;
    const at = nearest(phases[this.axis], value);
    const total = phases.values.reduce((sum, list) => sum + (list[at] || 0), 0);
    const rows = phases.names.map((label, index) => ({ at: phases[this.axis][at], colour: this.paint(index), label,
      text: `${figure(phases.values[index][at])} ms  ${((100 * phases.values[index][at]) / (total || 1)).toFixed(1)} %` }));
    return [...rows, { at: phases[this.axis][at], colour: "transparent", label: "together", text: `${figure(total)} ms` }];
  }
}

// processes, checkpoints, validations and trouble of one run, in hours
class TimeLine extends Chart {
  draw() {
    const line = this.options.timeline;
    const lanes = [["process", line.processes.length], ["checkpoint", line.checkpoints.length], ["validation", line.validations.length], ["trouble", line.marks.length]]
      .filter(([, count]) => count).map(([name]) => name);
    const ends = [...line.processes.flatMap((each) => [each.from, each.to]), ...line.checkpoints.flatMap((each) => [each.saved, each.committed]), ...line.validations].filter(isNumber);
    const height = 34 + 30 * lanes.length;
    this.frame([Math.min(0, ...ends), Math.max(...ends, 1e-4)], [0, 1], { yTick: null, height });
    this.items = [];
    const rowOf = (name) => this.box.top + 4 + 30 * lanes.indexOf(name);
    for (const lane of lanes) this.svg.append(node("text", { x: this.box.left - 7, y: rowOf(lane) + 15, "text-anchor": "end" }, lane));
    for (const each of line.processes) this.bar(each.from, each.to, rowOf("process"), 20, HOW[each.how] || "var(--muted)", "process", `from step ${figure(each.step)}: ${each.how}`, each.text);
    for (const each of line.checkpoints) {
      const paint = each.committed === null ? "var(--warn)" : "var(--c2)";
      this.bar(each.saved, each.committed ?? each.saved, rowOf("checkpoint") + 6, 8, paint, each.name,
        each.committed === null ? "saved here" : `in the bucket after ${span(each.committed - each.saved)}`, isNumber(each.bytes) ? `${compact(each.bytes)}B` : "");
    }
    for (const hours of line.validations) this.bar(hours, hours, rowOf("validation") + 4, 12, "var(--c3)", "validation", "", "");
    for (const each of line.marks) this.bar(each.hours, each.hours, rowOf("trouble") + 2, 16, "var(--bad)", each.kind, `step ${figure(each.step)}`, "");
    const hows = new Set(line.processes.map((each) => each.how));
    const keys = [...hows].map((how) => [{ open: "process without an end on record" }[how] || `process ${how}`, HOW[how], true]);
    if (line.checkpoints.some((each) => each.committed !== null)) keys.push(["checkpoint, from saved to in the bucket", "var(--c2)", true]);
    if (line.checkpoints.some((each) => each.committed === null)) keys.push(["checkpoint on this machine only", "var(--warn)", true]);
    this.showKeys(keys);
    this.finish();
  }

  bar(from, to, y, height, paint, label, text, more) {
    if (!isNumber(from)) return;
    const x = this.sx(from), width = Math.max(this.sx(isNumber(to) ? to : from) - x, 3);
    this.plot.append(node("rect", { x, y, width, height, rx: Math.min(3, width / 2), style: { fill: paint, opacity: 0.85 } }));
    this.items.push({ from, to: isNumber(to) ? to : from, y, height, paint, label, text, more, x, width });
  }

  rowsAt(value) {
    const x = this.sx(value);
    const near = this.items.filter((item) => x >= item.x - 4 && x <= item.x + item.width + 4).slice(0, 8);
    return near.map((item, index) => ({ at: value, head: index ? null : span(value), colour: item.paint, label: item.label, text: [item.text, item.more].filter(Boolean).join(", ") || span(item.from) }));
  }
}
const HOW = { done: "var(--good)", stopped: "var(--c0)", failed: "var(--bad)", killed: "var(--bad)", open: "var(--muted)" };
