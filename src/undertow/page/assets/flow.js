/* The network as a graph: blocks from top to bottom, an edge as wide as the gradient that it carries. */

const ROW = 30;
const LETTER = 7.5; // width of one, about

function flow(networks) {
  return el("section", { id: "flow" }, el("h2", {}, "Flow"),
    el("p", {}, "What the gradient flows through, from the objective E at the foot up to the input. Choose a block to see what goes in and out of it."
      + (page.gradients.runs.some((run) => run.findings.list.length) ? " Marks are findings: ● information, ▲ warning, ■ error." : "")),
    el("div", { class: "cards networks" }, networks.map(network)));
}

function network(graph) {
  const detail = el("div", { class: "detail", "aria-live": "polite" });
  const place = new Map(graph.nodes.map((node, i) => [node.name, 24 + i * ROW]));
  const marks = findingsAt(place, graph.run);
  const [width, logarithmic] = edgeWidths(graph.edges);
  const edges = graph.edges.filter((edge) => place.has(edge.source) && place.has(edge.target));
  const bend = (edge) => {
    const rows = (place.get(edge.target) - place.get(edge.source)) / ROW;
    return rows <= 1 ? 0 : 22 * rows ** 0.6;
  };
  const left = Math.min(40 + LETTER * Math.max(...graph.nodes.map((node) => nodeText(node).length)), 460);
  const svg = el("svg", { width: left + Math.max(70, ...edges.map((edge) => bend(edge) + 80)), height: 24 + graph.nodes.length * ROW, role: "group", "aria-label": "network" });
  const middle = (edge) => [left + bend(edge), (place.get(edge.source) + place.get(edge.target)) / 2];
  svg.append(...edges.map((edge) => {
    const [from, to, by] = [place.get(edge.source), place.get(edge.target), left + (4 / 3) * bend(edge)];
    return el("path", { d: `M${left} ${from}C${by} ${from} ${by} ${to} ${left} ${to}`, "stroke-width": width(edge.norm).toFixed(2) },
      el("title", {}, `${edge.target} to ${edge.source}: ${short(edge.norm)}`));
  }), ...edges.map((edge) => el("text", { class: "small", x: middle(edge)[0] + 8, y: middle(edge)[1] + 4 }, short(edge.norm))));
  const groups = graph.nodes.map((node) => {
    const y = place.get(node.name);
    const found = marks.get(node.name) ?? [];
    const tell = () => {
      for (const one of groups) one.setAttribute("aria-pressed", String(one === group));
      detail.replaceChildren(...describe(node, graph, found));
    };
    const group = el("g", { class: "node", tabindex: 0, role: "button", "aria-pressed": "false", "aria-label": `${nodeText(node)}${found.length ? `, ${found.length} findings` : ""}`,
      onclick: tell, onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); tell(); } } },
    el("rect", { x: 4, y: y - 13, width: left - 12, height: 26, rx: 4 }),
    el("text", { x: left - 14, y: y + 4, "text-anchor": "end", class: ["warning", "error"].includes(worst(found)) ? "marked" : null },
      `${found.length ? `${MARKS[worst(found)]} ` : ""}${clipped(nodeText(node), Math.floor((left - 40) / LETTER))}`),
    el("circle", { cx: left, cy: y, r: 4 }));
    return group;
  });
  svg.append(...groups);
  const first = graph.nodes.find((node) => ["warning", "error"].includes(worst(marks.get(node.name) ?? []))) ?? graph.nodes[0];
  groups[graph.nodes.indexOf(first)].dispatchEvent(new Event("click"));
  return el("article", {}, el("h3", {}, graph.title || "the network"),
    el("p", { class: "note" }, `The wider an edge, the larger ${graph.of}${logarithmic ? "; widths are logarithmic" : ""}.`),
    el("div", { class: "beside" }, el("div", { class: "flow", tabindex: 0, role: "region", "aria-label": `${graph.title || "network"}, graph` }, svg), detail));
}

/** Return the findings of a run, or of all where the graph is of none, by the block that they are at. */
function findingsAt(place, only) {
  const marks = new Map();
  for (const [i, run] of page.gradients.runs.entries()) {
    if (only !== null && only !== i) continue;
    for (const finding of run.findings.list) for (const site of finding.sites) {
      const of = only === null && page.gradients.runs.length > 1 ? ` in ${run.name}` : "";
      if (place.has(site)) marks.set(site, [...(marks.get(site) ?? []), { ...finding, of }]);
    }
  }
  return marks;
}

/** Return how wide an edge is for its norm, and whether that is logarithmic. */
function edgeWidths(edges) {
  const norms = edges.map((edge) => edge.norm).filter((norm) => norm > 0);
  const [low, high] = [Math.min(...norms), Math.max(...norms)];
  const logarithmic = norms.length > 0 && high / low >= 100;
  const share = (norm) => (!(norm > 0) ? 0 : logarithmic ? Math.log(norm / low) / Math.log(high / low) : norm / high);
  return [(norm) => 0.5 + 7.5 * share(norm), logarithmic];
}

const nodeText = (node) => (node.kind && node.kind !== node.name ? `${node.name}  ${node.kind}` : node.name);
const clipped = (text, most) => (text.length > most ? `…${text.slice(text.length - most + 1)}` : text);

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
  return [el("h4", {}, nodeText(node)), el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])),
    ...found.map((finding) => el("p", {}, el("b", { class: finding.severity }, `${finding.severity} ${finding.cause}${finding.of}: `), finding.sentence))];
}
