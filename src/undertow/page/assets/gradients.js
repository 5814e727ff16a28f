/* What was recorded of each layer, of one run or several on the same axes. */

const RUNS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const MAX_SITES = 8; // a finding of more has buttons for the first ones, and, if it only informs, no mark in the chart
const NAMES = {
  magnitude: "|value|", value: "value", channel_norm: "ℓ2 norm of a channel", norm: "ℓ2 norm", rms: "root mean square",
  zero_fraction: "fraction of zeros",
};

function gradients(data) {
  const labels = layerLabels(data.runs);
  const state = gradients.state ??= { scale: "log", layer: labels[0]?.label, sort: "number" };
  if (!labels.some((one) => one.label === state.layer)) state.layer = labels[0]?.label;
  const several = data.runs.length > 1;
  const what = NAMES[data.runs[0].of] ?? data.runs[0].of;
  const section = el("section", { id: "gradients" }, el("h2", {}, "Gradients"));
  section.append(...data.runs.map((run, i) => el("p", {}, several ? el("b", { style: { color: ink(i) } }, `■ ${run.name} `) : el("b", {}, `${run.name} `),
    `${run.batches} ${run.batches === 1 ? "batch" : "batches"}, ${run.finished ? "finished" : "not finished"}`
    + `${run.every > 1 ? `; of the course every ${run.every}th batch is shown` : ""}`)));
  section.append(...data.contrast.map((sentence) => el("p", {}, sentence)));
  if (!labels.length) {
    section.append(el("p", {}, "Nothing that can be drawn was recorded yet."), findings(data, null));
    return section;
  }
  const charts = {
    layers: chart("Each layer, in order of execution"), course: chart("Over time"), histogram: chart("Histogram"),
    octaves: chart("Histogram over time"), channels: chart("Channel norms"),
  };
  const chosen = el("select", { onchange: () => choose(chosen.value) });
  chosen.append(...labels.map((one) => el("option", { value: one.label, selected: one.label === state.layer }, one.label)));
  const drawLayers = () => layersChart(charts.layers, data, labels, state, what, choose);
  const drawLayer = () => layerCharts(charts, data, labels.find((one) => one.label === state.layer), state, what);
  function choose(label) {
    state.layer = label;
    chosen.value = label;
    charts.layers.view?.signal("chosen", label).runAsync();
    drawLayer();
  }
  const set = (name, ...draw) => (value) => { state[name] = value; draw.forEach((one) => one()); };
  section.append(
    findings(data, (label) => { choose(label); charts.course.node.scrollIntoView({ block: "center" }); }, labels),
    el("p", {}, `Of each layer the ${what}: line from 5 to 95 %, bar from 25 to 75 %, tick at the median; below it how much is exactly zero. `
      + "A click on a layer chooses it."),
    el("div", { class: "controls" }, choice("Scale", "scale", [["log", "logarithmic"], ["linear", "linear"]], state.scale, set("scale", drawLayers, drawLayer))),
    charts.layers.node,
    asTable("as a table", () => table(["layer", ...(several ? ["run"] : []), ...data.q.map((q) => `${100 * q} %`), "zero", "NaN or infinite"],
      labels.flatMap((one) => one.layers.map((layer, i) => layer && [one.label, ...(several ? [data.runs[i].name] : []), ...layer.quantiles,
        percent(layer.zeros), layer.nonfinite])).filter(Boolean), "quantiles of each layer")),
    el("div", { class: "controls" }, el("label", { class: "label" }, "Layer", chosen),
      choice("Channels by", "sort", [["number", "number"], ["norm", "norm"]], state.sort, set("sort", drawLayer))),
    charts.course.node, charts.histogram.node, charts.octaves.node, charts.channels.node);
  gradients.draw = () => { drawLayers(); drawLayer(); };
  return section;
}

/** Pair the layers of several runs: by name where all have the same ones, else by their order. */
function layerLabels(runs) {
  const names = runs.map((run) => run.layers.map((layer) => layer.label));
  const same = names.every((one) => one.length === names[0].length && one.every((label) => names[0].includes(label)));
  if (same) return names[0].map((label) => ({ label, layers: runs.map((run) => run.layers.find((layer) => layer.label === label)) }));
  const longest = Math.max(...names.map((one) => one.length));
  return [...Array(longest).keys()].map((i) => ({
    label: [...new Set(names.map((one) => one[i]).filter((name) => name !== undefined))].join(" / "),
    layers: runs.map((run) => run.layers[i] ?? null),
  }));
}

function findings(data, choose, labels = []) {
  const several = data.runs.length > 1;
  const list = data.runs.flatMap((run, i) => run.findings.list.map((finding) => el("article", { class: `finding ${finding.severity}` },
    el("h3", {}, el("b", { class: finding.severity }, finding.severity), ` ${finding.cause}`, several ? ` in ${run.name}` : ""),
    el("p", {}, finding.sentence),
    finding.evidence.predicted !== undefined && finding.evidence.predicted !== null ? el("p", {}, `predicted ${evidence(finding.evidence.predicted)}, observed ${evidence(finding.evidence.observed)}`) : "",
    finding.remedy ? el("p", {}, el("b", {}, "Remedy: "), finding.remedy) : "",
    finding.source ? el("p", { class: "note" }, `Source: ${finding.source}`) : "",
    choose && el("div", { class: "buttons" }, finding.sites.slice(0, MAX_SITES).map((site) => {
      const one = labels.find((label) => label.layers[i]?.site === site);
      return one ? el("button", { type: "button", onclick: () => choose(one.label) }, site) : "";
    }), finding.sites.length > MAX_SITES ? `and ${finding.sites.length - MAX_SITES} more` : ""))));
  const checked = data.runs.map((run) => {
    const rows = Object.entries(run.findings.checked);
    const looked = rows.filter(([, state]) => state === "checked").map(([rule]) => rule);
    return [el("dt", {}, several ? `${run.name}: checked` : "checked"), el("dd", {}, looked.join(", ") || "nothing"),
      rows.filter(([, state]) => state !== "checked").map(([rule, state]) => [el("dt", {}, rule), el("dd", {}, state)])];
  });
  return el("div", {}, el("h4", {}, "Findings"),
    list.length ? el("div", { class: "cards" }, list) : el("p", {}, "Nothing was found by the rules that could look."),
    el("details", {}, el("summary", {}, "what was checked, and what could not be"), el("dl", {}, checked)));
}

const marked = (finding) => finding.severity !== "info" || finding.sites.length <= MAX_SITES;

/** The axis of batches, whole numbers only. */
function batchAxis(batches, field = "t") {
  const step = Math.max(1, 10 ** Math.ceil(Math.log10(batches / 20)));
  const values = [];
  for (let t = 0; t <= batches; t += step) values.push(t);
  return { field, type: "quantitative", title: "batch", scale: { nice: false }, axis: { values, format: "d", grid: false, labelOverlap: true } };
}

const evidence = (value) => (typeof value === "number" ? short(value) : Array.isArray(value) ? value.map(evidence).join(", ") : String(value ?? "–"));

function chart(heading) {
  const area = el("div", { class: "chart", tabindex: 0, role: "group", "aria-label": heading });
  const title = el("h4", {}, heading);
  return { node: el("div", {}, title, area), area, title, heading, view: null };
}

const ink = (run) => (dark() ? ["#56B4E9", "#F28E4B", "#3FC79A", "#E2A5C8", "#F2BF4B", "#9FD3F2"] : RUNS)[run % RUNS.length];

/** Draw a Vega-Lite chart; text of others is only ever data in it. */
async function draw(one, heading, spec) {
  one.view?.finalize();
  one.view = null;
  one.node.hidden = !spec;
  if (!spec) return null;
  one.title.textContent = heading;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { labelColor: colour("--ink"), titleColor: colour("--ink"), gridColor: colour("--line"), domainColor: colour("--soft"), tickColor: colour("--soft"), titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12 };
  const config = { background: "transparent", view: { stroke: null }, axis, legend: { labelColor: colour("--ink"), titleColor: colour("--ink"), labelFontSize: 12, titleFontWeight: "normal" }, font: "system-ui, DejaVu Sans, sans-serif" };
  const tooltip = (handler, event, item, value) => {
    one.area.title = value === null || value === undefined || typeof value !== "object" ? "" : Object.entries(value).map(([k, v]) => `${k}: ${v}`).join("\n");
  };
  const { view } = await window.vegaEmbed(one.area, { ...spec, config }, { actions: false, defaultStyle: false, renderer: "canvas", tooltip, logLevel: 1, mode: "vega-lite" });
  one.view = view;
  return view;
}

/** A scale for sizes: logarithmic with zero at its foot, or linear. */
function sizes(values, kind, domain = {}) {
  const positive = values.filter((value) => value !== null && value !== 0 && Number.isFinite(value)).map(Math.abs);
  if (kind === "linear" || !positive.length) return { scale: { type: "linear", zero: true, ...domain }, axis: { format: "~g" } };
  const low = Math.floor(Math.log10(Math.min(...positive)));
  const high = Math.ceil(Math.log10(Math.max(...positive)));
  const step = Math.ceil((high - low + 1) / 8);
  const decades = [];
  for (let e = high; e >= low; e -= step) decades.unshift(e);
  const negative = values.some((value) => value < 0) ? decades.map((e) => -(10 ** e)) : [];
  return {
    scale: { type: "symlog", constant: 10 ** low / 2, ...domain },
    axis: { values: [...negative, 0, ...decades.map((e) => 10 ** e)], format: ".0e", labelExpr: "datum.value == 0 ? '0' : format(datum.value, '.0e')" },
  };
}

const fits = (one, layers) => Math.max(layers, (one.area.clientWidth || 600) - 90);

function layersChart(one, data, labels, state, what, choose) {
  const rows = labels.flatMap((label, place) => label.layers.map((layer, i) => layer && layer.quantiles[0] !== null && ({
    layer: label.label, place, run: data.runs[i].name, ...Object.fromEntries(layer.quantiles.map((value, k) => [`q${k}`, value])),
    zeros: layer.zeros, median: short(layer.quantiles[2]), range: `${short(layer.quantiles[0])} to ${short(layer.quantiles[4])}`, zero: percent(layer.zeros),
  })).filter(Boolean));
  const pins = data.runs.flatMap((run) => run.findings.list.filter(marked).flatMap((finding) => labels.filter((label) => label.layers.some((layer) => layer && finding.sites.includes(layer.site)))
    .map((label) => ({ layer: label.label, severity: finding.severity, finding: finding.cause }))));
  const order = labels.map((label) => label.label);
  const several = data.runs.length > 1;
  const runs = data.runs.map((run) => run.name);
  const size = sizes(rows.flatMap((row) => [row.q0, row.q1, row.q2, row.q3, row.q4]), state.scale);
  const width = fits(one, labels.length * (several ? 10 * data.runs.length : 14));
  const bar = Math.max(3, Math.min(22, (0.6 * width) / labels.length / data.runs.length));
  const x = (last) => ({ field: "layer", type: "ordinal", sort: order, title: null, axis: last ? { labelAngle: -45, labelLimit: 180, labelOverlap: true, grid: false } : null });
  const colour = { field: "run", type: "nominal", scale: { domain: runs, range: runs.map((_, i) => ink(i)) }, legend: several ? { title: null, orient: "top" } : null };
  const offset = several ? { xOffset: { field: "run", type: "nominal", sort: runs } } : {};
  const tooltip = [{ field: "layer" }, { field: "run" }, { field: "median" }, { field: "range", title: "5 to 95 %" }, { field: "zero", title: "exactly zero" }];
  const common = (last, y, opacity = 1) => ({ x: x(last), ...offset, color: colour, tooltip, y, opacity: { condition: { test: "datum.layer === chosen", value: opacity }, value: 0.75 * opacity } });
  const y = (field) => ({ field, type: "quantitative", title: what, ...size });
  const zeros = rows.some((row) => row.zeros !== null);
  const bands = {
    width, height: 260, data: { values: rows },
    layer: [
      { mark: { type: "rule", strokeWidth: 2 }, encoding: { ...common(!zeros, y("q0")), y2: { field: "q4" } } },
      { mark: { type: "bar", size: bar, cornerRadius: 1 }, encoding: { ...common(!zeros, y("q1"), 0.8), y2: { field: "q3" } } },
      { mark: { type: "tick", thickness: 3, size: bar + 4, color: dark() ? "#fff" : "#000" }, encoding: { x: x(!zeros), ...offset, y: y("q2"), tooltip } },
      ...(pins.length ? [{
        data: { values: pins }, mark: { type: "point", filled: true, size: 90, yOffset: -6 },
        encoding: { x: x(!zeros), y: { value: 0 }, shape: { field: "severity", type: "nominal", scale: { domain: ["info", "warning", "error"], range: ["circle", "triangle-up", "square"] }, legend: { title: "finding", orient: "top" } },
          color: { value: dark() ? "#f0b355" : "#8a5300" }, tooltip: [{ field: "layer" }, { field: "finding" }, { field: "severity" }] },
      }] : []),
    ],
  };
  const below = {
    width, height: 90, data: { values: rows.filter((row) => row.zeros !== null) },
    mark: { type: "bar", size: bar },
    encoding: { ...common(true, { field: "zeros", type: "quantitative", title: "exactly zero", scale: { domain: [0, 1] }, axis: { format: ".0%", tickCount: 3 } }) },
  };
  return draw(one, "Each layer, in order of execution", {
    params: [{ name: "chosen", value: state.layer }], ...(zeros ? { vconcat: [bands, below], spacing: 12, bounds: "flush" } : bands),
  }).then((view) => {
    view?.addEventListener("click", (_, item) => { if (item?.datum?.layer !== undefined && order.includes(item.datum.layer)) choose(item.datum.layer); });
  });
}

async function layerCharts(charts, data, label, state, what) {
  const width = fits(charts.course, 0);
  const runs = data.runs.map((run) => run.name);
  const several = runs.length > 1;
  const colour = { field: "run", type: "nominal", scale: { domain: runs, range: runs.map((_, i) => ink(i)) }, legend: several ? { title: null, orient: "top" } : null };
  const courses = await Promise.all(label.layers.map((layer) => layer && unpack(layer.course)));
  if (state.layer !== label.label) return;
  const rows = courses.flatMap((course, i) => course ? data.runs[i].course.map((batch, t) => ({
    t: t * data.runs[i].every, batch, run: runs[i], ...Object.fromEntries(data.q.map((_, k) => [`q${k}`, Number.isNaN(course[t * data.q.length + k]) ? null : course[t * data.q.length + k]])),
  })) : []);
  const size = sizes(rows.flatMap((row) => [row.q0, row.q2, row.q4]), state.scale);
  const y = (field, title = what) => ({ field, type: "quantitative", title, ...size });
  const most = Math.max(...data.runs.map((run) => run.batches));
  const x = batchAxis(most);
  const single = data.runs.every((run) => run.course.length < 2);
  await draw(charts.course, `${label.label} over time`, single ? null : {
    width, height: 220, data: { values: rows },
    layer: [
      { mark: { type: "area", opacity: 0.18 }, encoding: { x, y: y("q0"), y2: { field: "q4" }, color: colour } },
      { mark: { type: "area", opacity: 0.3 }, encoding: { x, y: y("q1"), y2: { field: "q3" }, color: colour } },
      { mark: { type: "line", strokeWidth: 2, point: rows.length <= 200 }, encoding: { x, y: y("q2"), color: colour, tooltip: [{ field: "batch" }, { field: "run" }, { field: "q2", title: "median", format: ".3g" }] } },
    ],
  });
  await histogramCharts(charts, data, label, runs, colour, width);
  await channelChart(charts.channels, data, label, runs, colour, width, state.sort);
}

async function histogramCharts(charts, data, label, runs, colour, width) {
  const several = runs.length > 1;
  const bars = [];
  const cells = [];
  for (const [i, layer] of label.layers.entries()) {
    const histogram = layer?.histogram;
    if (!histogram || !histogram.positive.length) continue;
    const total = layer.count || 1;
    histogram.positive.forEach((count, k) => {
      const [low, high] = [2 ** (histogram.low + k), 2 ** (histogram.low + k + 1)];
      const row = { low, high, run: runs[i], between: `${short(low)} to ${short(high)}` };
      const [up, down] = [count / total, histogram.negative[k] / total];
      if (several) bars.push({ ...row, foot: 0, top: up + down, share: up + down });
      else bars.push({ ...row, foot: 0, top: up, share: up, sign: "positive" }, { ...row, foot: up, top: up + down, share: down, sign: "negative" });
    });
    const [columns, octaves] = histogram.course.shape;
    if (columns > 1) {
      const shares = await unpack(histogram.course);
      const together = Math.ceil(data.runs[i].batches / columns);
      for (let t = 0; t < columns; t++) for (let k = 0; k < octaves; k++) {
        const share = (shares[t * octaves + k] / 255) * histogram.top;
        if (share) cells.push({ t: t * together, end: (t + 1) * together, low: 2 ** (histogram.low + k), high: 2 ** (histogram.low + k + 1), share, run: runs[i] });
      }
    }
  }
  const size = { type: "log", nice: false };
  const axis = { format: ".0e", labelOverlap: true, grid: false };
  const zeros = label.layers.map((layer, i) => layer?.histogram ? `${several ? `${runs[i]}: ` : ""}${percent(layer.zeros)} exactly zero` : "").filter(Boolean).join(", ");
  await draw(charts.histogram, `${label.label}: histogram of |value| in octaves, ${zeros}`, bars.length ? {
    width, height: 180, data: { values: bars }, mark: { type: "rect", opacity: several ? 0.55 : 1 },
    encoding: {
      x: { field: "low", type: "quantitative", scale: size, axis, title: "|value|" }, x2: { field: "high" },
      y: { field: "foot", type: "quantitative", title: "share", axis: { format: "~p" } }, y2: { field: "top" },
      color: several ? colour : { field: "sign", type: "nominal", scale: { domain: ["positive", "negative"], range: [ink(1), ink(0)] }, legend: { title: null, orient: "top" } },
      tooltip: [{ field: "between" }, { field: "share", format: ".3~p" }, { field: several ? "run" : "sign" }],
    },
  } : null);
  await draw(charts.octaves, `${label.label}: histogram over time`, cells.length ? {
    data: { values: cells }, facet: several ? { row: { field: "run", type: "nominal", title: null, sort: runs } } : undefined,
    ...((spec) => (several ? { spec } : spec))({
      width, height: 180, mark: { type: "rect" },
      encoding: {
        x: batchAxis(Math.max(...data.runs.map((run) => run.batches))), x2: { field: "end" },
        y: { field: "low", type: "quantitative", scale: size, axis, title: "|value|" }, y2: { field: "high" },
        color: { field: "share", type: "quantitative", scale: { scheme: dark() ? "viridis" : "blues" }, legend: { format: "~p", title: "share", orient: "top" } },
      },
    }),
  } : null);
}

async function channelChart(one, data, label, runs, colour, width, sort) {
  const norms = await Promise.all(label.layers.map((layer) => (layer?.channels ? unpack(layer.channels) : null)));
  const first = norms.find((values) => values);
  const order = first ? [...first.keys()].sort((a, b) => (sort === "norm" ? first[b] - first[a] : a - b)) : [];
  const place = new Map(order.map((channel, i) => [channel, i]));
  const rows = norms.flatMap((values, i) => values ? [...values].map((norm, channel) => ({ at: place.get(channel) ?? channel, channel, norm, run: runs[i] })) : []);
  await draw(one, `${label.label}: mean norm of each channel, by ${sort}`, rows.length ? {
    width, height: 160, data: { values: rows }, mark: { type: "bar", opacity: runs.length > 1 ? 0.55 : 1, width: { band: 1 } },
    encoding: {
      x: { field: "at", type: "ordinal", title: sort === "norm" ? "channel, strongest first" : "channel", axis: { labels: sort === "number", ticks: false, labelOverlap: true, labelAngle: 0, grid: false } },
      y: { field: "norm", type: "quantitative", stack: null, title: "ℓ2 norm", axis: { format: "~g" } }, color: colour,
      tooltip: [{ field: "channel" }, { field: "norm", format: ".3g" }, { field: "run" }],
    },
  } : null);
}
