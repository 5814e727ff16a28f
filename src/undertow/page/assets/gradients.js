/* What was recorded of each layer, of one run or several on the same axes. */

const MAX_SITES = 8; // a finding of more has buttons for the first ones, and, if it only informs, no mark in the chart
const NAMES = {
  magnitude: "|value|", value: "value", channel_norm: "ℓ2 norm of a channel", norm: "ℓ2 norm", rms: "root mean square",
  zero_fraction: "fraction of zeros",
};
const SEVERITIES = ["error", "warning", "info"];
const MARKS = { info: "●", warning: "▲", error: "■" };
const worst = (found) => SEVERITIES.find((severity) => found.some((finding) => finding.severity === severity));
const inked = { light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"], dark: ["#56B4E9", "#F28E4B", "#3FC79A", "#E2A5C8", "#F2BF4B", "#9FD3F2"] };
const ink = (run) => inked[dark() ? "dark" : "light"][run % 6];

function gradients(data) {
  const labels = layerLabels(data.runs);
  const state = gradients.state ??= { scale: "log", layer: labels[0]?.label, sort: "number" };
  if (!labels.some((one) => one.label === state.layer)) state.layer = labels[0]?.label;
  const what = NAMES[data.of];
  const section = el("section", { id: "gradients" }, el("h2", {}, "Gradients"),
    el("ul", { class: "runs" }, data.runs.map((run, i) => el("li", {}, data.runs.length > 1 ? el("i", { class: `run-${i % 6}`, "aria-hidden": "true" }, "■ ") : "",
      el("b", {}, run.name), ` ${said(run, what, data.measure)}`))), data.contrast.map((sentence) => el("p", {}, sentence)));
  if (!labels.length) {
    section.append(el("p", {}, "Nothing that can be drawn was recorded yet."), findings(data, () => {}, []));
    gradients.draw = null;
    return section;
  }
  const charts = Object.fromEntries(["layers", "course", "histogram", "octaves", "channels"].map((name) => [name, chart()]));
  const chosen = dropdown("Layer", labels.map((one) => [one.label, one.label]), state.layer, choose);
  const label = () => labels.find((one) => one.label === state.layer);
  const drawLayers = () => layersChart(charts.layers, data, labels, state, what, choose);
  const drawLayer = () => Promise.all([
    courseChart(charts.course, data, label(), state, what), histogramChart(charts.histogram, data, label()),
    octavesChart(charts.octaves, data, label()), channelChart(charts.channels, data, label(), state.sort),
  ]);
  function choose(name) {
    state.layer = name;
    chosen.querySelector("select").value = name;
    charts.layers.view?.signal("chosen", name).runAsync();
    drawLayer();
  }
  const set = (name, ...draw) => (value) => { state[name] = value; draw.forEach((one) => one()); };
  const scroll = (name) => { choose(name); charts.course.node.scrollIntoView({ block: "center" }); };
  section.append(
    el("p", {}, `Of each layer the ${what}: line from 5 to 95 %, bar from 25 to 75 %, tick at the median`
      + `${hasZeros(labels) ? "; below it how much is exactly zero" : ""}. A click on a layer chooses it.`
      + (data.runs.some((run) => run.findings.list.length) ? " Marks above are findings: ● information, ▲ warning, ■ error." : "")),
    el("div", { class: "controls" }, choice("Scale", "scale", [["log", "logarithmic"], ["linear", "linear"]], state.scale, set("scale", drawLayers, drawLayer))),
    charts.layers.node,
    asTable("as a table", () => layersTable(data, labels)),
    findings(data, scroll, labels),
    el("div", { class: "controls" }, chosen,
      labels.some((one) => one.layers.some((layer) => layer?.channels))
        ? choice("Channels by", "sort", [["number", "number"], ["norm", "norm"]], state.sort, set("sort", drawLayer)) : ""),
    charts.course.node, charts.histogram.node, charts.octaves.node, charts.channels.node);
  gradients.draw = () => Promise.all([drawLayers(), drawLayer()]);
  return section;
}

function said(run, what, measure) {
  if (!run.batches) return "no batch yet";
  return `${run.batches} ${run.batches === 1 ? "batch" : "batches"}, ${run.finished ? "finished" : "not finished"}`
    + `${run.every > 1 ? `; of the course every ${run.every}th batch is shown` : ""}`
    + `${run.layers.length ? "" : `; no ${what} in it: record the measure ${measure} to see it here`}`;
}

/** Pair the layers of several runs, each phase apart: by name where all have the same ones, else by their order. */
function layerLabels(runs) {
  const phases = [...new Set(runs.flatMap((run) => run.layers.map((layer) => layer.phase)))];
  return phases.flatMap((phase) => paired(runs.map((run) => run.layers.filter((layer) => layer.phase === phase))));
}

function paired(columns) {
  const names = columns.filter((column) => column.length).map((column) => column.map((layer) => layer.label));
  const same = names.every((one) => one.length === names[0].length && one.every((label) => names[0].includes(label)));
  if (same) return names[0].map((label) => ({ label, layers: columns.map((column) => column.find((layer) => layer.label === label)) }));
  return [...Array(Math.max(...names.map((one) => one.length))).keys()].map((i) => ({
    label: [...new Set(columns.filter((column) => column[i]).map((column) => column[i].label))].join(" / "),
    layers: columns.map((column) => column[i]),
  }));
}

const hasZeros = (labels) => labels.some((one) => one.layers.some((layer) => typeof layer?.zeros === "number"));

function layersTable(data, labels) {
  const several = data.runs.length > 1;
  const rows = labels.flatMap((one) => one.layers.map((layer, i) => layer && [one.label, ...(several ? [data.runs[i].name] : []),
    ...layer.quantiles, percent(layer.zeros), layer.nonfinite])).filter(Boolean);
  return table(["layer", ...(several ? ["run"] : []), ...data.q.map((q) => `${100 * q} %`), "zero", "NaN or infinite"], rows, "quantiles of each layer");
}

function findings(data, choose, labels) {
  const list = data.runs.flatMap((run, i) => run.findings.list.map((finding) => ({ finding, i })));
  list.sort((a, b) => SEVERITIES.indexOf(a.finding.severity) - SEVERITIES.indexOf(b.finding.severity));
  const button = (i) => (site) => {
    const one = labels.find((label) => label.layers[i]?.site === site);
    return one ? el("button", { type: "button", title: site, onclick: () => choose(one.label) }, site) : "";
  };
  const cards = list.map(({ finding, i }) => el("article", { class: `finding ${finding.severity}` },
    el("h4", {}, el("b", { class: finding.severity }, `${MARKS[finding.severity]} ${finding.severity}`), ` ${finding.cause}`,
      data.runs.length > 1 ? ` in ${data.runs[i].name}` : ""),
    el("p", {}, finding.sentence),
    (finding.evidence.predicted ?? null) === null ? "" : el("p", {}, `predicted ${evidence(finding.evidence.predicted)}, observed ${evidence(finding.evidence.observed)}`),
    finding.remedy ? el("p", {}, el("b", {}, "Remedy: "), finding.remedy) : "",
    finding.source ? el("p", { class: "note" }, `Source: ${finding.source}`) : "",
    el("div", { class: "buttons" }, finding.sites.slice(0, MAX_SITES).map(button(i)),
      finding.sites.length > MAX_SITES ? el("span", { class: "note" }, `and ${finding.sites.length - MAX_SITES} more`) : "")));
  const checked = data.runs.map((run) => {
    const rows = Object.entries(run.findings.checked);
    const looked = rows.filter(([, state]) => state === "checked").map(([rule]) => rule);
    return [el("dt", {}, data.runs.length > 1 ? `${run.name}: checked` : "checked"), el("dd", {}, looked.join(", ") || "nothing"),
      rows.filter(([, state]) => state !== "checked").map(([rule, state]) => [el("dt", {}, rule), el("dd", {}, state)])];
  });
  return el("div", { class: "findings" }, el("h3", {}, "Findings"),
    list.length ? el("div", { class: "cards wide" }, cards) : el("p", {}, "Nothing was found by the rules that could look."),
    el("details", {}, el("summary", {}, "what was checked, and what could not be"), el("dl", {}, checked)));
}

const evidence = (value) => (typeof value === "number" ? short(value) : Array.isArray(value) ? value.map(evidence).join(", ") : String(value ?? "–"));

function chart() {
  const area = el("div", { class: "chart", tabindex: 0, role: "group" });
  const title = el("h3", {});
  return { node: el("div", { hidden: true }, title, area), area, title, view: null, turn: 0 };
}

/** Draw a Vega-Lite chart, or hide it where there is no spec; text of others is only ever data in it. */
async function draw(one, heading, spec) {
  const turn = ++one.turn;
  one.node.hidden = !spec;
  one.title.textContent = heading;
  one.area.setAttribute("aria-label", heading);
  if (!spec) return;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const text = { labelColor: colour("--ink"), titleColor: colour("--ink"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  const config = {
    background: "transparent", font: "system-ui, DejaVu Sans, sans-serif", view: { stroke: null },
    axis: { ...text, gridColor: colour("--line"), domainColor: colour("--soft"), tickColor: colour("--soft") },
    legend: { ...text, orient: "top", symbolOpacity: 1, labelLimit: 240 }, header: { ...text, labelAnchor: "start", labelOrient: "top", labelLimit: 300 },
  };
  const tooltip = (handler, event, item, value) => {
    one.area.title = value && typeof value === "object" ? Object.entries(value).map(([k, v]) => `${k}: ${v}`).join("\n") : "";
  };
  const box = el("div", {});
  const { view } = await window.vegaEmbed(box, { ...spec, config }, { actions: false, defaultStyle: false, renderer: "canvas", tooltip, logLevel: 1, mode: "vega-lite" });
  if (turn !== one.turn) { view.finalize(); return; }
  one.view?.finalize();
  one.view = view;
  one.area.replaceChildren(box);
}

/** The width of a chart: that of the page, and more where its marks need it. */
const fits = (least = 0) => Math.max(least, (document.getElementById("content").clientWidth || 600) - 130);

/** The powers of ten over some sizes, at most about eight of them. */
function decades(values) {
  const low = Math.floor(Math.log10(values.reduce((a, b) => Math.min(a, b))));
  const high = Math.ceil(Math.log10(values.reduce((a, b) => Math.max(a, b))));
  const found = [];
  for (let e = high; e >= low; e -= Math.ceil((high - low + 1) / 8)) found.unshift(Number(`1e${e}`));
  return found;
}

/** A scale for sizes: logarithmic with zero at its foot, or linear. */
function sizes(values, kind) {
  const positive = values.filter((value) => value && Number.isFinite(value)).map(Math.abs);
  if (kind === "linear" || !positive.length) return { scale: { type: "linear", zero: true }, axis: { format: "~g" } };
  const ticks = decades(positive);
  const negative = values.some((value) => value < 0) ? ticks.map((tick) => -tick) : [];
  return {
    scale: { type: "symlog", constant: ticks[0] / 2 },
    axis: { values: [...negative, 0, ...ticks], labelExpr: "datum.value == 0 ? '0' : format(datum.value, '.0e')" },
  };
}

/** A logarithmic axis of octaves: powers of ten, or whatever fits where there are hardly any. */
function octaveAxis(lows) {
  const ticks = decades(lows);
  const axis = ticks.length > 3 ? { format: ".0e", values: ticks } : { format: ".1~e", labelOverlap: true, tickCount: 4 };
  return { type: "quantitative", scale: { type: "log", nice: false }, title: "|value|", axis: { ...axis, grid: false } };
}

/** The axis of batches, whole numbers only. */
function batchAxis(batches) {
  const step = Math.max(1, 10 ** Math.ceil(Math.log10(batches / 20)));
  const values = [];
  for (let t = 0; t <= batches; t += step) values.push(t);
  return { field: "t", type: "quantitative", title: "batch", scale: { nice: false }, axis: { values, format: "d", grid: false, labelOverlap: true } };
}

/** The colours of the runs, by their number: two may have one name. */
const runColour = (data) => ({
  field: "i", type: "nominal", scale: { domain: data.runs.map((_, i) => i), range: data.runs.map((_, i) => ink(i)) },
  legend: data.runs.length > 1 ? { title: null, labelExpr: "names[datum.value]", symbolType: "square" } : null,
});
const runNames = (data) => ({ name: "names", value: data.runs.map((run) => run.name) });

function layersChart(one, data, labels, state, what, choose) {
  const several = data.runs.length > 1;
  const rows = labels.flatMap(({ label, layers }) => layers.flatMap((layer, i) => (layer && layer.quantiles[0] !== null ? [{
    layer: label, i, run: data.runs[i].name, ...Object.fromEntries(layer.quantiles.map((value, k) => [`q${k}`, value])),
    zeros: layer.zeros, median: short(layer.quantiles[2]), range: `${short(layer.quantiles[0])} to ${short(layer.quantiles[4])}`, zero: percent(layer.zeros),
  }] : [])));
  const pins = labels.flatMap(({ label, layers }) => {
    const found = layers.flatMap((layer, i) => (layer ? data.runs[i].findings.list.filter((finding) => marked(finding) && finding.sites.includes(layer.site)) : []));
    return found.length ? [{ layer: label, mark: MARKS[worst(found)], severity: worst(found), findings: [...new Set(found.map((finding) => finding.cause))].join(", ") }] : [];
  });
  const order = labels.map((label) => label.label);
  const width = fits(labels.length * (several ? 10 * data.runs.length : 14));
  const bar = Math.max(3, Math.min(22, (0.6 * width) / labels.length / data.runs.length));
  const level = Math.max(...order.map((label) => label.length)) * 7 < width / labels.length;
  const x = (last) => ({ field: "layer", type: "ordinal", sort: null, scale: { domain: order }, title: null,
    axis: last ? { labelAngle: level ? 0 : -45, labelLimit: 180, labelOverlap: true, grid: false } : null });
  const offset = several ? { xOffset: { field: "i", type: "nominal", sort: null, scale: { domain: data.runs.map((_, i) => i) } } } : {};
  const tooltip = [{ field: "layer" }, { field: "run" }, { field: "median" }, { field: "range", title: "5 to 95 %" }, { field: "zero", title: "exactly zero" }];
  const faint = (most) => ({ condition: { test: "datum.layer === chosen", value: most }, value: 0.7 * most });
  const common = (last, y, opacity) => ({ x: x(last), ...offset, color: runColour(data), tooltip, y, opacity: faint(opacity) });
  const size = sizes(rows.flatMap((row) => [row.q0, row.q1, row.q2, row.q3, row.q4]), state.scale);
  const y = (field) => ({ field, type: "quantitative", title: what, ...size });
  const zeros = hasZeros(labels);
  const bands = {
    width, height: 260, data: { values: rows },
    layer: [
      { mark: { type: "rule", strokeWidth: 2 }, encoding: { ...common(!zeros, y("q0"), 1), y2: { field: "q4" } } },
      { mark: { type: "bar", size: bar, cornerRadius: 1 }, encoding: { ...common(!zeros, y("q1"), 0.85), y2: { field: "q3" } } },
      { mark: { type: "tick", thickness: 3, size: bar + 4, color: dark() ? "#fff" : "#000" }, encoding: { x: x(!zeros), ...offset, y: y("q2"), tooltip } },
      { data: { values: pins }, mark: { type: "text", fontSize: 14, yOffset: -10, color: dark() ? "#f0b355" : "#8a5300" },
        encoding: { x: x(!zeros), y: { value: 0 }, text: { field: "mark" }, tooltip: [{ field: "layer" }, { field: "severity" }, { field: "findings" }] } },
    ],
  };
  const below = {
    width, height: 90, data: { values: rows.filter((row) => row.zeros !== null) }, mark: { type: "bar", size: bar },
    encoding: common(true, { field: "zeros", type: "quantitative", title: "exactly zero", scale: { domain: [0, 1] }, axis: { format: ".0%", tickCount: 3 } }, 1),
  };
  return draw(one, "Each layer, in order of execution", {
    params: [{ name: "chosen", value: state.layer }, runNames(data)], ...(zeros ? { vconcat: [bands, below], spacing: 12, bounds: "flush" } : bands),
  }).then(() => one.view?.addEventListener("click", (_, item) => { if (order.includes(item?.datum?.layer)) choose(item.datum.layer); }));
}

const marked = (finding) => finding.severity !== "info" || finding.sites.length <= MAX_SITES;

async function courseChart(one, data, label, state, what) {
  const courses = await Promise.all(label.layers.map((layer) => layer && unpack(layer.course)));
  if (state.layer !== label.label) return;
  const rows = courses.flatMap((course, i) => (course ? data.runs[i].course.map((batch, t) => ({
    t: t * data.runs[i].every, batch, i, run: data.runs[i].name,
    ...Object.fromEntries(data.q.map((_, k) => [`q${k}`, finite(course[t * data.q.length + k])])),
  })) : []));
  const size = sizes(rows.flatMap((row) => [row.q0, row.q2, row.q4]), state.scale);
  const y = (field) => ({ field, type: "quantitative", title: what, ...size });
  const x = batchAxis(Math.max(...data.runs.map((run) => run.batches)));
  const color = runColour(data);
  const single = data.runs.every((run) => run.course.length < 2) || rows.every((row) => row.q2 === null);
  await draw(one, `${label.label}: ${what} over time`, single ? null : {
    width: fits(), height: 220, data: { values: rows }, params: [runNames(data)],
    layer: [
      { mark: { type: "area", opacity: 0.18 }, encoding: { x, y: y("q0"), y2: { field: "q4" }, color } },
      { mark: { type: "area", opacity: 0.3 }, encoding: { x, y: y("q1"), y2: { field: "q3" }, color } },
      { mark: { type: "line", strokeWidth: 2, point: rows.length <= 200 },
        encoding: { x, y: y("q2"), color, tooltip: [{ field: "batch" }, { field: "run" }, { field: "q2", title: "median", format: ".3g" }] } },
    ],
  });
}

const finite = (value) => (Number.isFinite(value) ? value : null);

/** The shares of |value| in octaves: of one run positive on negative, of several outlines over one another. */
async function histogramChart(one, data, label) {
  const several = data.runs.length > 1;
  const rows = label.layers.flatMap((layer, i) => (layer?.histogram ? layer.histogram.positive.flatMap((count, k) => {
    const { low: first, negative } = layer.histogram;
    const [low, high] = [2 ** (first + k), 2 ** (first + k + 1)];
    const [up, down] = [count / layer.count, negative[k] / layer.count];
    const row = { low, high, i, run: data.runs[i].name, between: `${short(low)} to ${short(high)}` };
    if (!several) return [{ ...row, foot: 0, top: up, share: up, sign: "positive" }, { ...row, foot: up, top: up + down, share: down, sign: "negative" }];
    const outline = [{ ...row, share: up + down }];
    if (k === 0) outline.unshift({ ...row, share: 0 });
    if (k === negative.length - 1) outline.push({ ...row, low: high, share: 0 });
    return outline;
  }) : []));
  const zeros = label.layers.map((layer, i) => (layer?.histogram ? `${several ? `${data.runs[i].name}: ` : ""}${percent(layer.zeros)} exactly zero` : "")).filter(Boolean);
  const x = rows.length && { field: "low", ...octaveAxis(rows.map((row) => row.low)) };
  const y = { type: "quantitative", title: "share", axis: { format: "~p" } };
  const tooltip = [{ field: "between" }, { field: "share", format: ".3~p" }, { field: several ? "run" : "sign" }];
  const signs = { field: "sign", type: "nominal", scale: { domain: ["positive", "negative"], range: [ink(1), ink(0)] }, legend: { title: null } };
  await draw(one, `${label.label}: histogram of |value| in octaves, ${zeros.join(", ")}`, rows.length ? {
    width: fits(), height: 180, data: { values: rows }, params: [runNames(data)],
    ...(several ? { mark: { type: "area", interpolate: "step-after", line: true, opacity: 0.25 }, encoding: { x, y: { ...y, field: "share", stack: null }, color: runColour(data), tooltip } }
      : { mark: "rect", encoding: { x, x2: { field: "high" }, y: { ...y, field: "foot" }, y2: { field: "top" }, color: signs, tooltip } }),
  } : null);
}

async function octavesChart(one, data, label) {
  const several = data.runs.length > 1;
  const shares = await Promise.all(label.layers.map((layer) => layer?.histogram && unpack(layer.histogram.course)));
  const cells = label.layers.flatMap((layer, i) => {
    const [columns, octaves] = layer?.histogram?.course.shape ?? [0, 0];
    if (columns < 2) return [];
    const together = Math.ceil(data.runs[i].batches / columns);
    return [...shares[i]].flatMap((share, at) => {
      const [t, k] = [Math.floor(at / octaves), layer.histogram.low + (at % octaves)];
      return share ? [{ t: t * together, end: (t + 1) * together, low: 2 ** k, high: 2 ** (k + 1), share: (share / 255) * layer.histogram.top, i }] : [];
    });
  });
  const spec = () => ({
    width: fits(), height: 180, mark: "rect",
    encoding: {
      x: batchAxis(Math.max(...data.runs.map((run) => run.batches))), x2: { field: "end" },
      y: { field: "low", ...octaveAxis(cells.map((cell) => cell.low)) }, y2: { field: "high" },
      color: { field: "share", type: "quantitative", scale: { scheme: dark() ? "viridis" : "blues" }, legend: { format: "~p", title: "share" } },
    },
  });
  await draw(one, `${label.label}: histogram over time`, !cells.length ? null : {
    data: { values: cells }, params: [runNames(data)],
    ...(several ? { facet: { row: { field: "i", type: "nominal", title: null, header: { labelExpr: "names[datum.value]" } } }, spec: spec() } : spec()),
  });
}

async function channelChart(one, data, label, sort) {
  const norms = await Promise.all(label.layers.map((layer) => (layer?.channels ? unpack(layer.channels) : null)));
  const first = norms.find((values) => values);
  const size = (channel) => (Number.isFinite(first[channel]) ? first[channel] : Infinity);
  const order = first ? [...first.keys()].sort((a, b) => (sort === "norm" ? size(b) - size(a) || a - b : a - b)) : [];
  const place = new Map(order.map((channel, i) => [channel, i]));
  const rows = norms.flatMap((values, i) => (values ? [...values].map((norm, channel) => ({ at: place.get(channel) ?? channel, channel, norm: finite(norm), i, run: data.runs[i].name })) : []));
  const unknown = rows.filter((row) => row.norm === null).length;
  await draw(one, `${label.label}: mean norm of each channel, by ${sort}${unknown ? `; ${unknown} are NaN or infinite` : ""}`, rows.length ? {
    width: fits(), height: 160, data: { values: rows }, params: [runNames(data)], mark: { type: "bar", width: { band: 1 } },
    encoding: {
      x: { field: "at", type: "ordinal", title: sort === "norm" ? "channel, strongest first" : "channel", axis: { labels: sort === "number", ticks: false, labelOverlap: true, labelAngle: 0, grid: false } },
      ...(data.runs.length > 1 ? { xOffset: { field: "i", type: "nominal", sort: null, scale: { domain: data.runs.map((_, i) => i) } } } : {}),
      y: { field: "norm", type: "quantitative", stack: null, title: "ℓ2 norm", axis: { format: "~g" } }, color: runColour(data),
      tooltip: [{ field: "channel" }, { field: "norm", format: ".3g" }, { field: "run" }],
    },
  } : null);
}
