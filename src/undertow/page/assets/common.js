"use strict";
const page = JSON.parse(document.getElementById("data").textContent);

/** Make an element; texts become text nodes, so that no name is ever read as markup. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "circle", "rect", "text", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const unpacked = new Map();

/** Unpack an array of numbers: base64, deflated; of bfloat16 first all low bytes, then all high ones. */
function unpack(packed) {
  if (!unpacked.has(packed.array)) unpacked.set(packed.array, inflate(packed));
  return unpacked.get(packed.array);
}

async function inflate(packed) {
  const text = page.arrays ? page.arrays[packed.array] : document.getElementById(`array-${packed.array}`).textContent;
  const deflated = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  if (packed.kind === "uint8") return raw;
  const count = raw.length / 2;
  const bits = new Uint32Array(count);
  for (let i = 0; i < count; i++) bits[i] = (raw[i] << 16) | (raw[count + i] << 24);
  return new Float32Array(bits.buffer);
}

/** Write a number in as few digits as tell it, with a real minus sign. */
function short(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  return text.replace("e+", "e").replaceAll("-", "−");
}

const percent = (share) => (share === null || share === undefined ? "–" : `${short(100 * share)} %`);

/** A group of radio buttons: one of several words. */
function choice(legend, name, words, chosen, then) {
  const options = words.map(([value, text]) => {
    const input = el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => then(value) });
    return el("label", {}, input, ` ${text}`);
  });
  return el("fieldset", {}, el("legend", {}, legend), options);
}

function dropdown(label, words, chosen, then) {
  const select = el("select", { "aria-label": label, onchange: () => then(select.value) });
  for (const [value, text] of words) select.append(el("option", { value, selected: value === chosen }, text));
  return el("label", { class: "label" }, label, select);
}

function download(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** Write numbers as NumPy keeps them: a .npy file of float32. */
function npy(values, shape) {
  const sides = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${sides}), }`;
  const padded = header.padEnd(Math.ceil((header.length + 11) / 64) * 64 - 11) + "\n";
  const start = new Uint8Array(10);
  start.set([0x93, 78, 85, 77, 80, 89, 1, 0, padded.length & 255, padded.length >> 8]);
  return new Blob([start, padded, values], { type: "application/octet-stream" });
}

const whenIdle = window.requestIdleCallback?.bind(window) ?? ((then) => setTimeout(then, 50));
const safeName = (text) => text.replace(/[^\p{L}\p{N}._-]+/gu, "_") || "unnamed";
const dark = () => document.documentElement.dataset.theme === "dark";

function table(headings, rows, caption) {
  const cell = (tag, value) => el(tag, { class: typeof value === "number" ? "number" : null, scope: tag === "th" ? "col" : null },
    typeof value === "number" ? short(value, 4) : String(value ?? "–"));
  return el("div", { class: "table", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, headings.map((h) => cell("th", h)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => cell("td", value)))))));
}

const asTable = (summary, make) => {
  const details = el("details", { ontoggle: () => { if (details.open && details.children.length === 1) details.append(make()); } },
    el("summary", {}, summary));
  return details;
};
