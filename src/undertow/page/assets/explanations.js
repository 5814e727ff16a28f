/* Photographs with their maps: which rule, which class, how drawn, how strongly laid over. */

const HEAT = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const SIGNED = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];
const STYLES = { magnitude: "magnitude", signed: "signed", colour: "colour" };

function ramp(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  return stops[i].map((low, c) => Math.round(low + (stops[i + 1][c] - low) * (place - i)));
}

/** Return the largest |value| over the channels and their sum, of one pixel. */
function atPixel(map, values, pixel) {
  const area = map.values.shape[1] * map.values.shape[2];
  if (map.reduced) return [values[pixel], values[area + pixel]];
  let largest = 0;
  let sum = 0;
  for (let c = 0; c < map.values.shape[0]; c++) {
    largest = Math.max(largest, Math.abs(values[c * area + pixel]));
    sum += values[c * area + pixel];
  }
  return [largest, sum];
}

/** The value at which the colours of the signed map end: the 99th percentile of |sum|. */
function signedTop(map, values) {
  const area = map.values.shape[1] * map.values.shape[2];
  const sizes = new Float32Array(area);
  for (let i = 0; i < area; i++) sizes[i] = Math.abs(atPixel(map, values, i)[1]);
  sizes.sort();
  return sizes[Math.floor(0.99 * (area - 1))] || sizes[area - 1];
}

/** Draw one map as pixels; the weaker a value, the sooner the photograph shows through. */
function paint(canvas, map, values, style, opacity) {
  const [channels, height, width] = map.values.shape;
  const area = height * width;
  const image = new ImageData(width, height);
  const top = style === "signed" ? signedTop(map, values) : map.top;
  let mean = 0;
  let deviation = 1;
  if (style === "colour") {
    mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length) || 1;
  }
  for (let i = 0; i < area; i++) {
    let rgb;
    let strength = 1;
    if (style === "colour") {
      const grey = (c) => 255 * Math.min(Math.max(0.5 + (0.1 * (values[c * area + i] - mean)) / deviation, 0), 1);
      rgb = channels === 3 ? [grey(0), grey(1), grey(2)] : [grey(0), grey(0), grey(0)];
    } else {
      const [largest, sum] = atPixel(map, values, i);
      const share = top ? (style === "signed" ? sum : largest) / top : 0;
      strength = Math.sqrt(Math.min(Math.abs(share), 1));
      rgb = style === "signed" ? ramp(SIGNED, 0.5 + share / 2) : ramp(HEAT, share);
    }
    image.data.set(rgb, 4 * i);
    image.data[4 * i + 3] = 255 * opacity ** (1 + 3 * (1 - strength));
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return top;
}

function explanations(data) {
  const keys = [...new Set(data.cards.flatMap((card) => card.maps.map((map) => map.key)))];
  const ranks = Math.max(1, ...data.cards.map((card) => card.targets.length));
  const state = { key: keys[0], rank: 0, style: "magnitude", opacity: 0.65 };
  const cards = data.cards.map((card) => explained(card, state));
  const redraw = () => cards.forEach((card) => card.redraw());
  const set = (name) => (value) => { state[name] = value; redraw(); };
  const styles = Object.entries(STYLES).filter(([style]) => data.in_colour || style !== "colour");
  const slider = el("input", { type: "range", min: 0, max: 100, value: 65, oninput: () => set("opacity")(slider.value / 100) });
  return el("section", { id: "explanations" }, el("h2", {}, "Explanations"),
    el("p", {}, "Which pixels spoke for the class. Move over a map, or focus it and use the arrow keys, to read its values, "
      + "which are within 0.4 % of those on the disk."),
    data.in_colour ? "" : el("p", {}, "So many maps are here without their single channels: there is no colour."),
    keys.length ? el("div", { class: "controls" },
      choice("Rule", "rule", keys.map((key) => [key, key]), state.key, set("key")),
      ranks > 1 ? dropdown("Class", [...Array(ranks).keys()].map((k) => [String(k), ranks > 1 && data.cards.length === 1
        ? data.cards[0].targets[k].name : `explained class ${k + 1}`]), "0", (k) => set("rank")(Number(k))) : "",
      choice("Drawn as", "style", styles, state.style, set("style")),
      el("label", { class: "label" }, "Map over photograph", slider)) : "",
    el("div", { class: "cards" }, cards.map((card) => card.node)));
}

function explained(card, state) {
  const canvas = el("canvas", { tabindex: 0, role: "img" });
  const photograph = card.photograph ? el("img", { src: card.photograph, alt: `${card.name}, as the network sees it` }) : "";
  const probe = el("output", { class: "probe", "aria-live": "polite" });
  const scale = el("div", { class: "scale" });
  const heading = el("p", {});
  const verdict = el("div", {});
  const stack = el("div", { class: "stack" }, photograph, canvas);
  let shown = null;
  let at = null;

  const current = () => card.maps.find((map) => map.key === state.key && map.target === Math.min(state.rank, card.targets.length - 1));

  async function redraw() {
    const map = current();
    if (!visible || !card.maps.length) return;
    canvas.hidden = !map;
    verdict.replaceChildren(...(map ? verdictOf(card, state.key, card.targets[map.target].class) : []));
    if (!map) {
      heading.textContent = `no map of ${state.key} here`;
      scale.replaceChildren();
      shown = null;
      return;
    }
    const values = await unpack(map.values);
    if (map !== current()) return;
    const top = paint(canvas, map, values, state.style, card.photograph ? state.opacity : 1);
    shown = { map, values };
    const target = card.targets[map.target];
    const name = target.name || `class ${target.class}`;
    canvas.setAttribute("aria-label", `${map.key} map for ${name}; arrow keys read its values`);
    heading.replaceChildren(el("b", {}, name), ` ${target.score === null ? "" : short(target.score)} `,
      el("span", { class: "note" }, `${map.key}${map.rewired ? `, ${map.rewired} activations rewired` : ""}`
        + `${map.head === "as is" ? "" : `, score ${map.head}`}`));
    drawScale(scale, state.style, top);
    tell();
  }

  function tell() {
    if (!shown || !at) return;
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

  const file = () => safeName(`${card.name}-${shown.map.key}-${card.targets[shown.map.target].name}`);
  const buttons = el("div", { class: "buttons" },
    el("button", { type: "button", onclick: () => shown && savePicture(canvas, photograph, `${file()}-${state.style}.png`) }, "Download PNG"),
    el("button", { type: "button", onclick: () => shown && download(`${file()}.npy`, npy(shown.values, shown.map.values.shape)) },
      "Download values"));
  const node = el("article", {}, el("h3", {}, card.name), stack, card.maps.length ? [scale, probe, heading] : "", verdict,
    predictions(card), card.notes.map((note) => el("p", { class: "note" }, note)), card.maps.length ? buttons : "");
  let visible = false;
  if (!card.maps.length) verdict.replaceChildren(...Object.keys(card.verdicts).flatMap((key) => verdictOf(card, key, card.verdicts[key].class)));
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    visible = true;
    observer.disconnect();
    redraw();
  }, { rootMargin: "600px" }).observe(node);
  window.addEventListener("beforeprint", () => { visible = true; redraw(); });
  return { node, redraw };
}

/** Draw photograph and map as they are seen. */
function savePicture(canvas, photograph, name) {
  const copy = el("canvas", { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d");
  if (photograph) context.drawImage(photograph, 0, 0, copy.width, copy.height);
  context.drawImage(canvas, 0, 0);
  copy.toBlob((blob) => download(name, blob), "image/png");
}

function drawScale(scale, style, top) {
  if (style === "colour") {
    scale.replaceChildren(el("span", {}, "mid-grey is the mean; a tenth of the range a standard deviation"));
    return;
  }
  const stops = (style === "signed" ? SIGNED : HEAT).map((rgb) => `rgb(${rgb.join(",")})`).join(", ");
  scale.replaceChildren(el("span", {}, style === "signed" ? short(-top) : "0"),
    el("i", { style: { background: `linear-gradient(to right, ${stops})` } }), el("span", {}, short(top)));
}

/** The verdict on the map of a rule and a class; of other classes' maps nothing was asked. */
function verdictOf(card, key, target) {
  const verdict = card.verdicts[key];
  if (!verdict) return [];
  if (verdict.class !== target) return [el("p", { class: "verdict" }, "May it be believed? Not asked of this class's map.")];
  const rows = verdict.answers.map((answer) => [el("dt", {}, answer.question, " ", el("b", { class: answer.level }, answer.level)), el("dd", {}, answer.sentence)]);
  const rest = Object.entries(verdict.unanswered).map(([question, why]) => [el("dt", {}, `${question}: not asked`), el("dd", {}, why)]);
  return [el("p", { class: "verdict" }, el("b", {}, "May it be believed? "), verdict.sentence.replaceAll("*", "")),
    el("details", {}, el("summary", {}, "the six answers"), el("dl", {}, rows, rest))];
}

function predictions(card) {
  if (!card.predictions.length) return "";
  const all = card.predictions.map((p) => p.probability ?? p.score);
  const most = Math.max(...all.map(Math.abs)) || 1;
  return el("ol", { class: "predictions", "aria-label": "predictions" }, card.predictions.map((p, i) => el("li",
    { style: { "--share": `${(100 * Math.max(all[i], 0)) / (p.probability === null ? most : 1)}%` } },
    el("span", {}, p.name), el("span", {}, p.probability === null ? short(p.score) : percent(p.probability)))));
}
