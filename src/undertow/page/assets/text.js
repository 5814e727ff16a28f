/* Tokens, shaded by their attribution. */

function texts(list) {
  return el("section", { id: "text" }, el("h2", {}, "Text"), list.map((one) => {
    const top = Math.max(...one.values.map(Math.abs)) || 1;
    const scale = el("div", { class: "scale", style: { "max-width": "24rem" } });
    drawScale(scale, "signed", top);
    return el("div", {}, one.title ? el("h3", {}, one.title) : "", scale,
      el("p", { class: "tokens", style: { color: "inherit" } }, one.tokens.map((token, i) => el("span",
        { title: short(one.values[i]), style: { background: `rgb(${ramp(SIGNED, 0.5 + one.values[i] / top / 2).join(",")})`, color: Math.abs(one.values[i]) > 0.8 * top ? "#fff" : "#18181b" } }, token))),
      asTable("as a table", () => table(["token", "attribution"], one.tokens.map((token, i) => [JSON.stringify(token), one.values[i]]), "tokens")));
  }));
}
