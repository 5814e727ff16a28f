/* Puts the sections there, switches light and dark, and, where the page is served, asks for what is new. */

const SECTIONS = [
  ["explanations", "Explanations", () => page.explanations.cards.length && explanations(page.explanations)],
  ["gradients", "Gradients", () => page.gradients.runs.length && gradients(page.gradients)],
  ["flow", "Flow", () => page.flow.length && flow(page.flow)],
  ["text", "Text", () => page.text.length && texts(page.text)],
  ["made", "How it was made", () => made(page.made)],
];

function made(list) {
  const value = (one) => (one !== null && typeof one === "object" ? JSON.stringify(one) : String(one ?? "–"));
  return el("section", { id: "made" }, el("h2", {}, "How it was made"), list.map((one) => el("details", { open: list.length <= 2 },
    el("summary", {}, one.title), el("dl", {}, Object.entries(one.facts).map(([name, fact]) => [el("dt", {}, name), el("dd", {}, value(fact))])))));
}

function show(only) {
  const main = document.getElementById("content");
  const links = [];
  for (const [id, heading, make] of SECTIONS) {
    const before = document.getElementById(id);
    if (before && only && !only.includes(id)) { links.push([id, heading]); continue; }
    const section = make();
    if (!section) continue;
    links.push([id, heading]);
    if (before) before.replaceWith(section);
    else main.append(section);
  }
  document.getElementById("sections").replaceChildren(...links.map(([id, heading]) => el("a", { href: `#${id}` }, heading)));
  return gradients.draw?.();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  gradients.draw?.();
}

const wanted = window.matchMedia("(prefers-color-scheme: dark)");
setTheme(wanted.matches ? "dark" : "light");
wanted.addEventListener("change", () => setTheme(wanted.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
// the milliseconds since the page was asked for, when all is there and when its charts are drawn
const past = () => Math.round(performance.now());
const drawn = show();
document.documentElement.dataset.ready = past();
Promise.resolve(drawn).then(() => { document.documentElement.dataset.drawn = past(); });

/** Draw sections anew, and leave the reader where they were: the focus, and what was unfolded. */
function renew(ids) {
  const called = (node) => node.value ? `${node.name}=${node.value}` : node.getAttribute("aria-label") ?? node.textContent;
  const active = document.activeElement;
  const place = active && ids.find((id) => document.getElementById(id)?.contains(active));
  const unfolded = [...document.querySelectorAll("details[open] > summary")].map((node) => node.textContent);
  show(ids);
  for (const summary of document.querySelectorAll("summary")) {
    if (unfolded.includes(summary.textContent)) summary.parentElement.open = true;
  }
  const again = place && [...document.getElementById(place).querySelectorAll(active.tagName)].find((node) => called(node) === called(active));
  again?.focus({ preventScroll: true });
}

async function ask() {
  const news = document.getElementById("news");
  try {
    const answer = await fetch(`${page.live}?seen=${encodeURIComponent(page.version)}`, { cache: "no-store" });
    if (answer.status === 200) {
      Object.assign(page, await answer.json());
      unpacked.clear();
      renew(["gradients", "flow"]);
      news.textContent = `updated ${new Date().toLocaleTimeString()}`;
    } else if (answer.status !== 204) news.textContent = await answer.text();
  } catch {
    news.textContent = "undertow view has ended; what is here is what it told last";
    return;
  }
  if (page.gradients.runs.every((run) => run.finished)) news.textContent = "finished";
  else setTimeout(ask, 1000);
}
if (page.live) setTimeout(ask, 1000);
