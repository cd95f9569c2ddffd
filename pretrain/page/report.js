"use strict";
// Which charts a report has, and what can be clicked; charts.js comes before it.

const percent = (value) => (isNumber(value) ? `${Number((100 * value).toPrecision(3))} %` : "–");
const SERIES_CHARTS = [
  { id: "lr", title: "Learning rate", fields: { lr: "lr" }, fromZero: true },
  { id: "grad_norm", title: "Gradient norm", fields: { grad_norm: "grad norm" }, clips: true, canLog: true, fromZero: true },
  { id: "loss_scale", title: "Loss scale", fields: { loss_scale: "loss scale" }, canLog: true, fromZero: true },
  { id: "throughput", title: "Throughput", unit: "tokens per second", fields: { tokens_per_second: "tokens/s" }, fromZero: true, clips: true },
  { id: "mfu", title: "MFU", unit: "of the peak", fields: { mfu: "6N + 12LdT", mfu_causal: "causal" }, tick: percent, format: percent, fromZero: true },
  { id: "step_ms", title: "Step time", unit: "ms", fields: { step_ms: "step" }, clips: true, fromZero: true },
  { id: "data_wait", title: "Wait for data", unit: "ms a step", fields: { data_wait_ms: "wait" }, clips: true, fromZero: true },
  { id: "memory", title: "Memory", unit: "GB", fields: { gpu_memory_gb: "GPU, in use", gpu_memory_peak_gb: "GPU, peak of torch", host_memory_gb: "host, this process" }, fromZero: true },
  { id: "power", title: "Power", unit: "W", fields: { power_w: "power" }, fromZero: true },
  { id: "utilization", title: "Utilization", unit: "%", fields: { utilization: "utilization" }, fromZero: true },
  { id: "energy", title: "Energy", unit: "J a token", fields: { energy_j_per_token: "energy" }, fromZero: true, clips: true },
];
const DASHES = ["", "6 3", "2 3"];

function linesOf(fields) {
  return (axis) => RUNS.flatMap((run, index) => Object.entries(fields).flatMap(([field, label], number) => {
    const series = run.series[field];
    if (!series) return [];
    const paint = RUNS.length > 1 ? colour(index) : colour(number);
    return [{ run: index, label, x: run.x[axis], y: series.mean, low: series.low, high: series.high, smooth: series.smooth, colour: paint, dash: RUNS.length > 1 ? DASHES[number] : "" }];
  }));
}

function lossLines(axis) {
  const lines = linesOf({ loss: "training" })(axis);
  const validations = RUNS.flatMap((run, index) => run.validation.loss.length ? [{
    run: index, label: "validation", x: run.validation[axis], y: run.validation.loss, dots: run.validation.loss.length <= 80,
    colour: RUNS.length > 1 ? colour(index) : colour(1), dash: RUNS.length > 1 ? "5 3" : "",
  }] : []);
  return [...lines, ...validations];
}

function powerCharts() {
  RUNS.forEach((run, index) => {
    if (!run.power) return;
    const of = RUNS.length > 1 ? ` of ${run.name}` : "";
    const name = (device) => (/^\d+$/.test(device) ? `GPU ${device}` : device.toUpperCase());
    for (const [field, title, unit] of [["power_w", "Power by device", "W"], ["utilization", "Utilization by device", "%"], ["temperature_c", "Temperature by device", "°C"]]) {
      const devices = run.power.devices.filter((device) => device[field]);
      if (devices.length) new LineChart(`${field}-devices-${index}`, title + of, { unit, x: "hours", fromZero: true, alwaysKeys: true,
        lines: () => devices.map((device, at) => ({ run: index, label: name(device.device), x: device.hours, y: device[field], colour: colour(at) })) });
    }
    const close = run.power.close_up;
    if (close) new LineChart(`close-up-${index}`, `The last seconds${of}: power and phases`, { unit: "W", x: "seconds", size: "wide", bands: close.bands, alwaysKeys: true, fromZero: true,
      lines: () => close.devices.map((device, at) => ({ run: index, label: name(device.device), x: device.seconds, y: device.power_w, colour: colour(at) })) });
  });
}

function build() {
  if (RUNS.some((run) => run.series.loss)) new LineChart("loss", "Loss", { unit: "nats a token", size: "wide", height: 360, canLog: true, lines: lossLines, alwaysKeys: true, showsRestarts: true });
  for (const chart of SERIES_CHARTS) {
    if (!RUNS.some((run) => Object.keys(chart.fields).some((field) => run.series[field]))) continue;
    new LineChart(chart.id, chart.title, { ...chart, lines: linesOf(chart.fields) });
  }
  RUNS.forEach((run, index) => {
    const of = RUNS.length > 1 ? ` of ${run.name}` : "";
    if (run.phases) new StackChart(`phases-${index}`, `Phases of a step${of}`, { unit: "ms", phases: run.phases, size: "half" });
  });
  powerCharts();
  RUNS.forEach((run, index) => {
    const of = RUNS.length > 1 ? ` of ${run.name}` : "";
    if (run.timeline.processes.length) new TimeLine(`timeline-${index}`, `Time line${of}`, { timeline: run.timeline, x: "hours", size: "wide", left: 76 });
  });
  fillRows();
}

// No hole at the end of a row: where charts of one width don't fill their rows, the last of them are wider.
function fillRows() {
  const isWide = window.innerWidth > 1100;
  let group = [];
  const close = () => {
    const size = group.length ? group[0].options.size || "" : "wide";
    const perRow = { wide: 1, half: 2, "": 3 }[size];
    const last = group.length % perRow === 1 && perRow === 3 && group.length > 3 ? 4 : group.length % perRow;
    group.forEach((chart, at) => {
      const span = last && at >= group.length - last ? 12 / Math.min(last, 2) : null;
      chart.root.style.gridColumn = isWide && span ? `span ${span}` : "";
    });
    group = [];
  };
  for (const chart of charts) {
    if (group.length && (group[0].options.size || "") !== (chart.options.size || "")) close();
    group.push(chart);
  }
  close();
}

function drawAll() {
  for (const chart of charts) chart.draw();
  document.body.dataset.charts = charts.length;
}

// ---- what can be clicked ----

function controls() {
  const legend = document.getElementById("legend");
  if (RUNS.length > 1) RUNS.forEach((run, index) => {
    const button = node("button", { "aria-pressed": "true" }, node("i", { class: "key", style: { background: colour(index) } }), run.name);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(index)) view.hidden.add(index);
      button.setAttribute("aria-pressed", `${!view.hidden.has(index)}`);
      drawAll();
    });
    legend.append(button);
  });
  const axes = [...document.querySelectorAll("#axis button")];
  for (const button of axes) button.addEventListener("click", () => {
    view.x = button.dataset.x;
    axes.forEach((other) => other.setAttribute("aria-pressed", `${other === button}`));
    drawAll();
  });
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    requestAnimationFrame(() => { fillRows(); drawAll(); });
  });
}

if (!RUNS.some((run) => run.x.tokens.some(isNumber))) {
  view.x = "step";
  document.querySelectorAll("#axis button").forEach((button) => button.setAttribute("aria-pressed", `${button.dataset.x === "step"}`));
}
build();
controls();
drawAll();
