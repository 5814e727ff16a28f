/* Photographs with their maps: which rule, which class, how drawn, how strongly laid over. */

const HEAT = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const SIGNED = [[5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247],
  [253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31]];
const STEPS = 1024;

function ramp(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  return stops[i].map((low, c) => Math.round(low + (stops[i + 1][c] - low) * (place - i)));
}

const COLOURS = { magnitude: HEAT, signed: SIGNED };

/** Return the largest |value| over the channels and their sum, of one pixel. */
function atPixel(map, values, pixel) {
  const area = map.values.shape[1] * map.values.shape[2];
  if (map.reduced) return [values[pixel], values[area + pixel]];
  let largest = 0;
  let sum = 0;
  for (let at = pixel; at < values.length; at += area) {
    largest = Math.max(largest, Math.abs(values[at]));
    sum += values[at];
  }
  return [largest, sum];
}

/** Draw one map as pixels; the weaker a value, the sooner the photograph shows through. */
function paint(canvas, map, values, style, opacity) {
  const [, height, width] = map.values.shape;
  const image = new ImageData(width, height);
  if (style === "colour") fillColour(image.data, map, values, opacity);
  else {
    const shades = shadesOf(style, opacity);
    const pixels = new Uint32Array(image.data.buffer);
    const [from, span] = style === "signed" ? [-map.tops.signed, 2 * map.tops.signed] : [0, map.tops.magnitude];
    planeOf(map, values, style).forEach((value, i) => {
      pixels[i] = shades[Math.round(STEPS * Math.min(Math.max((value - from) / (span || 1), 0), 1))];
    });
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The pixels of a style's scale, from one end to the other, as the bytes of red, green, blue and opacity. */
function shadesOf(style, opacity) {
  const bytes = new Uint8ClampedArray(4 * (STEPS + 1));
  for (let i = 0; i <= STEPS; i++) {
    const strength = Math.sqrt(style === "signed" ? Math.abs((2 * i) / STEPS - 1) : i / STEPS);
    bytes.set([...ramp(COLOURS[style], i / STEPS), 255 * opacity ** (1 + 3 * (1 - strength))], 4 * i);
  }
  return new Uint32Array(bytes.buffer);
}

/** The largest |value| over the channels of each pixel, or their sum. */
function planeOf(map, values, style) {
  const area = map.values.shape[1] * map.values.shape[2];
  if (map.reduced) return style === "signed" ? values.subarray(area) : values.subarray(0, area);
  const plane = new Float32Array(area);
  for (let at = 0; at < values.length; at++) {
    plane[at % area] = style === "signed" ? plane[at % area] + values[at] : Math.max(plane[at % area], Math.abs(values[at]));
  }
  return plane;
}

function fillColour(bytes, map, values, opacity) {
  const [channels, height, width] = map.values.shape;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length) || 1;
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) {
      const value = values[(channels === 3 ? c : 0) * height * width + i];
      bytes[4 * i + c] = Math.floor(255 * Math.min(Math.max(0.5 + (0.1 * (value - mean)) / deviation, 0), 1));
    }
    bytes[4 * i + 3] = 255 * opacity;
  }
}

function explanations(data) {
  const keys = [...new Set(data.cards.flatMap((card) => card.maps.map((map) => map.key)))];
  const ranks = Math.max(1, ...data.cards.map((card) => card.targets.length));
  const state = { key: keys[0], rank: 0, style: "magnitude", opacity: 0.65 };
  const cards = data.cards.map((card) => explained(card, state));
  const set = (name) => (value) => { state[name] = value; cards.forEach((card) => card.redraw()); };
  const styles = ["magnitude", "signed", ...(data.colour ? ["colour"] : [])].map((style) => [style, style]);
  const slider = el("input", { type: "range", min: 0, max: 100, value: 65, oninput: () => set("opacity")(slider.value / 100) });
  const rankName = (k) => {
    const names = new Set(data.cards.map((card) => card.targets[k]?.name ?? ""));
    return names.size === 1 && !names.has("") ? [...names][0] : `number ${k + 1} of each`;
  };
  return el("section", { id: "explanations" }, el("h2", {}, "Explanations"),
    el("p", {}, "Which pixels spoke for the class. Move over a map, or focus it and use the arrow keys, to read its values, "
      + "which are within 0.4 % of those on the disk."),
    data.in_colour ? "" : el("p", {}, "So many maps are here without their single channels: there is no colour."),
    keys.length ? el("div", { class: "controls" },
      choice("Rule", "rule", keys.map((key) => [key, key]), state.key, set("key")),
      ranks > 1 ? dropdown("Class", [...Array(ranks).keys()].map((k) => [String(k), rankName(k)]), "0", (k) => set("rank")(Number(k))) : "",
      choice("Drawn as", "style", styles, state.style, set("style")),
      el("label", { class: "label" }, "Map over photograph", slider)) : "",
    el("div", { class: "cards" }, cards.map((card) => card.node)));
}

function explained(card, state) {
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": `${card.name}, map` });
  const photograph = card.photograph ? el("img", { src: card.photograph, alt: `${card.name}, as the network sees it` }) : "";
  const probe = el("output", { class: "probe" });
  const scale = el("div", { class: "scale" });
  const heading = el("p", {});
  const verdict = el("div", {});
  const notes = el("div", {});
  let shown = null;
  let at = null;

  const current = () => card.maps.find((map) => map.key === state.key && map.target === Math.min(state.rank, card.targets.length - 1));

  /** Show map, name, verdict and notes of one rule and class, all of them or none. */
  async function draw() {
    const map = current();
    const values = map && await unpack(map.values);
    if (map !== current()) return;
    stale = false;
    shown = map && { map, values };
    canvas.hidden = !map;
    for (const button of buttons.children) button.disabled = !map;
    const target = map && card.targets[map.target];
    verdict.replaceChildren(...(map ? verdictOf(card, map.key, target.class) : []));
    notes.replaceChildren(...card.notes.filter((note) => ofMap(note, state.key)).map((note) => el("p", { class: "note" }, note)));
    heading.replaceChildren(...(map ? headingOf(map, target) : [`no map of ${state.key} here`]));
    if (map) {
      const style = state.style === "colour" && map.values.shape[0] !== 3 && map.values.shape[0] !== 1 ? "magnitude" : state.style;
      paint(canvas, map, values, style, card.photograph ? state.opacity : 1);
      canvas.setAttribute("aria-label", `${card.name}: ${map.key} map for ${nameOf(target)}; arrow keys read its values`);
      drawScale(scale, COLOURS[style], style === "signed" ? -map.tops.signed : 0, map.tops[style]);
    } else scale.replaceChildren();
    tell();
  }

  const keys = card.maps.map((map) => map.key);
  const ofMap = (note, key) => note.startsWith(`${key}: `) || !keys.some((one) => note.startsWith(`${one}: `));

  function tell() {
    if (!shown || !at) { probe.textContent = ""; return; }
    const [, height, width] = shown.map.values.shape;
    at = [Math.min(Math.max(at[0], 0), width - 1), Math.min(Math.max(at[1], 0), height - 1)];
    const [largest, sum] = atPixel(shown.map, shown.values, at[1] * width + at[0]);
    probe.textContent = `x ${at[0]}, y ${at[1]}: largest |value| ${short(largest)}, sum ${short(sum)}`;
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    at = [Math.floor((event.clientX - box.left) * canvas.width / box.width), Math.floor((event.clientY - box.top) * canvas.height / box.height)];
    tell();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !shown) return;
    event.preventDefault();
    const by = event.shiftKey ? 10 : 1;
    at = at ? [at[0] + by * step[0], at[1] + by * step[1]] : [canvas.width >> 1, canvas.height >> 1];
    tell();
  });

  const file = () => safeName(`${card.name}-${shown.map.key}-${nameOf(card.targets[shown.map.target])}`);
  const buttons = el("div", { class: "buttons" },
    el("button", { type: "button", onclick: () => savePicture(canvas, photograph, `${file()}-${state.style}.png`) }, "Download PNG"),
    el("button", { type: "button", onclick: () => download(`${file()}.npy`, npy(shown.values, shown.map.values.shape)) }, "Download values"));
  const node = el("article", {}, el("h3", {}, card.name), el("div", { class: "stack" }, photograph, card.maps.length ? canvas : ""),
    card.maps.length ? [scale, probe, heading] : "", verdict, predictions(card), notes, card.maps.length ? buttons : "");

  // maps in sight are drawn at once, the others when the browser has time, so that they are there when it prints
  let near = false;
  let stale = true;
  const drawStale = () => { if (stale) draw(); };
  function redraw() {
    stale = true;
    if (near) draw();
    else whenIdle(drawStale);
  }
  if (card.maps.length) {
    redraw();
    new IntersectionObserver((entries) => { near = entries.at(-1).isIntersecting; if (near) drawStale(); }, { rootMargin: "300px" }).observe(node);
    window.addEventListener("beforeprint", drawStale);
  } else verdict.replaceChildren(...Object.keys(card.verdicts).flatMap((key) => verdictOf(card, key, card.verdicts[key].class)));
  return { node, redraw: card.maps.length ? redraw : () => {} };
}

const nameOf = (target) => target.name || `class ${target.class}`;

function headingOf(map, target) {
  const how = [map.key, map.rewired ? `${map.rewired} calls rewired` : "", map.head === "as is" ? "" : `score ${map.head}`];
  return [el("b", {}, nameOf(target)), ` ${target.score === null ? "" : short(target.score)} `,
    el("span", { class: "note" }, how.filter(Boolean).join(", "))];
}

/** Draw photograph and map as they are seen. */
function savePicture(canvas, photograph, name) {
  const copy = el("canvas", { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d");
  if (photograph) context.drawImage(photograph, 0, 0, copy.width, copy.height);
  context.drawImage(canvas, 0, 0);
  copy.toBlob((blob) => download(name, blob), "image/png");
}

function drawScale(scale, stops, low, high) {
  if (!stops) {
    scale.replaceChildren(el("span", {}, "mid-grey is the mean; a tenth of the range a standard deviation"));
    return;
  }
  const colours = stops.map((rgb) => `rgb(${rgb.join(",")})`).join(", ");
  scale.replaceChildren(el("span", {}, short(low)),
    el("i", { style: { background: `linear-gradient(to right, ${colours})` } }), el("span", {}, short(high)));
}

/** The verdict on the map of a rule and a class; of other classes' maps nothing was asked. */
function verdictOf(card, key, target) {
  const verdict = card.verdicts[key];
  if (!verdict) return [];
  if (verdict.class !== target) return [el("p", { class: "verdict" }, "May it be believed? Not asked of this class's map.")];
  const rows = verdict.answers.map((answer) => [el("dt", {}, answer.question, " ", el("b", { class: answer.level }, answer.level)), el("dd", {}, answer.sentence)]);
  const rest = Object.entries(verdict.unanswered).map(([question, why]) => [el("dt", {}, `${question}: not asked`), el("dd", {}, why)]);
  return [el("p", { class: "verdict" }, el("b", {}, "May it be believed? "), verdict.sentence.replaceAll("*", "")),
    el("details", {}, el("summary", {}, "the answers to each question"), el("dl", {}, rows, rest))];
}

function predictions(card) {
  if (!card.predictions.length) return "";
  const all = card.predictions.map((p) => p.probability ?? p.score);
  const most = Math.max(...all.map(Math.abs)) || 1;
  return el("ol", { class: "predictions", "aria-label": "predictions" }, card.predictions.map((p, i) => el("li",
    { style: { "--share": `${(100 * Math.max(all[i], 0)) / (p.probability === null ? most : 1)}%` } },
    el("span", {}, p.name), el("span", {}, p.probability === null ? short(p.score) : percent(p.probability)))));
}
