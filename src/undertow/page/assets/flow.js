/* The network as a graph: blocks from top to bottom, an edge as wide as the gradient that it carries. */

const ROW = 30;
const MARKS = { info: "● ", warning: "▲ ", error: "■ " };
const worst = (found) => ["error", "warning", "info"].find((severity) => found.some((finding) => finding.severity === severity));

function flow(networks) {
  return el("section", { id: "flow" }, el("h2", {}, "Flow"), networks.map(network));
}

function network(graph) {
  const detail = el("div", { class: "detail", "aria-live": "polite" });
  const place = new Map(graph.nodes.map((node, i) => [node.name, 24 + i * ROW]));
  const norms = graph.edges.map((edge) => edge.norm).filter((norm) => norm > 0);
  const [low, high] = [Math.min(...norms), Math.max(...norms)];
  const logarithmic = norms.length && high / low >= 100;
  const width = (norm) => (!(norm > 0) ? 0.5 : logarithmic ? 0.5 + (7.5 * Math.log(norm / low)) / Math.log(high / low) : 0.5 + (7.5 * norm) / high);
  const names = Math.max(...graph.nodes.map((node) => `${node.name}  ${node.kind}`.length));
  const left = Math.min(40 + 7.5 * names, 460);
  const bend = (from, to) => (to - from <= ROW ? 0 : 22 * ((to - from) / ROW) ** 0.6);
  const reach = Math.max(120, ...graph.edges.filter((edge) => place.has(edge.target)).map((edge) => bend(place.get(edge.source), place.get(edge.target)) + 90));
  const svg = el("svg", { width: left + reach, height: 24 + graph.nodes.length * ROW, role: "group", "aria-label": "network" });
  for (const edge of graph.edges) {
    if (!place.has(edge.source) || !place.has(edge.target)) continue;
    const [from, to] = [place.get(edge.source), place.get(edge.target)];
    const by = (4 / 3) * bend(from, to);
    svg.append(el("path", { d: `M${left} ${from}C${left + by} ${from} ${left + by} ${to} ${left} ${to}`, "stroke-width": width(edge.norm).toFixed(2) },
      el("title", {}, `${edge.target} to ${edge.source}: ${short(edge.norm)}`)),
    el("text", { class: "small", x: left + 0.75 * by + 8, y: (from + to) / 2 + 4 }, short(edge.norm)));
  }
  const marks = new Map();
  for (const run of page.gradients.runs) for (const finding of run.findings.list) for (const site of finding.sites) {
    if (place.has(site)) marks.set(site, [...(marks.get(site) ?? []), finding]);
  }
  for (const node of graph.nodes) {
    const y = place.get(node.name);
    const found = marks.get(node.name) ?? [];
    const tell = () => {
      svg.querySelectorAll("[aria-pressed]").forEach((one) => one.setAttribute("aria-pressed", "false"));
      group.setAttribute("aria-pressed", "true");
      detail.replaceChildren(...describe(node, graph, found));
    };
    const group = el("g", { class: "node", tabindex: 0, role: "button", "aria-pressed": "false", "aria-label": `${node.name} ${node.kind}${found.length ? `, ${found.length} findings` : ""}`,
      onclick: tell, onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); tell(); } } },
    el("rect", { x: 4, y: y - 13, width: left - 12, height: 26, rx: 4 }),
    el("text", { x: left - 14, y: y + 4, "text-anchor": "end", class: ["warning", "error"].includes(worst(found)) ? "marked" : null }, `${MARKS[worst(found)] ?? ""}${clipped(node, left)}`),
    el("circle", { cx: left, cy: y, r: 4 }));
    svg.append(group);
  }
  return el("div", {}, graph.title ? el("h3", {}, graph.title) : "",
    el("p", {}, `The wider an edge, the larger ${graph.of}${logarithmic ? " (logarithmic)" : ""}. Choose a block to see what goes in and out of it.`),
    el("div", { class: "beside" }, el("div", { class: "flow", tabindex: 0, role: "region", "aria-label": `${graph.title || "network"}, graph` }, svg), detail));
}

function clipped(node, left) {
  const text = node.kind && node.kind !== node.name ? `${node.name}  ${node.kind}` : node.name;
  const most = Math.floor((left - 24) / 7.5);
  return text.length > most ? `…${text.slice(text.length - most + 1)}` : text;
}

function describe(node, graph, found) {
  const shape = (value) => (value ? value.join(" × ") : "–");
  const number = (value) => (typeof value === "number" ? short(value, 4) : value ?? "–");
  const rows = [["gradient at its output", number(node.gradient)],
    ...graph.edges.filter((edge) => edge.source === node.name).map((edge) => [`from ${edge.target}`, number(edge.norm)]),
    ...graph.edges.filter((edge) => edge.target === node.name).map((edge) => [`to ${edge.source}`, number(edge.norm)])];
  for (const call of node.trace) {
    rows.push(["input", shape(call.input_shape)], ["output", shape(call.output_shape)], ["gradient by output", number(call.output_gradient)],
      ["gradient by input", number(call.input_gradient)], ["closed formula", call.formula]);
    if (call.note) rows.push(["note", call.note]);
  }
  return [el("h4", {}, node.name), el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])),
    ...found.map((finding) => el("p", {}, el("b", {}, `${finding.severity} ${finding.cause}: `), finding.sentence))];
}
