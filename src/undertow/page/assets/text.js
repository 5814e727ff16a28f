/* Tokens, shaded by their attribution. */

const SHADES = SIGNED.slice(2, 9); // dark ink is read on all of them

function texts(list) {
  return el("section", { id: "text" }, el("h2", {}, "Text"), list.map((one) => {
    const top = Math.max(...one.values.map(Math.abs)) || 1;
    const scale = el("div", { class: "scale narrow" });
    drawScale(scale, SHADES, -top, top);
    const shade = (value) => `rgb(${ramp(SHADES, 0.5 + value / top / 2).join(",")})`;
    return el("div", {}, one.title ? el("h3", {}, one.title) : "", scale,
      el("p", { class: "tokens" }, one.tokens.map((token, i) => el("span", { title: short(one.values[i]), style: { background: shade(one.values[i]) } }, token))),
      asTable("as a table", () => table(["token", "attribution"], one.tokens.map((token, i) => [JSON.stringify(token), one.values[i]]), "tokens")));
  }));
}
