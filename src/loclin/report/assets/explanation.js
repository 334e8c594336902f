(() => {
  const data = JSON.parse(byId("data").textContent);
  const plots = ["shares", "scatter", "spectra"];
  let selected = -1, shownBefore = true;

  function zero(columns) {
    const cell = element("td", "note", "The map of this token is zero: nothing it holds reaches this position.");
    cell.colSpan = columns;
    return element("tr", "", cell);
  }

  function blockRow(block) {
    const sigma = element("td", "sigma", element("b", "", block.name), " = " + block.values);
    const meter = element("span", "meter");
    meter.style.width = 100 * block.size + "%";
    sigma.append(meter, block.gain === null
      ? element("small", "near", "near-equal: one space")
      : element("small", "", "v·x " + block.gain));
    return element("tr", "", sigma, words("reads", block.reads), words("writes", block.writes));
  }

  function unitRow(side, unit) {
    const name = element("td", "", "unit " + unit.index + " ", element("small", "", unit.norm));
    return element("tr", "", name, words(side, unit.words));
  }

  function mark(index, on) {
    const chip = document.querySelector(`.chip[data-token="${index}"]`);
    const row = document.querySelector(`tr[data-token="${index}"]`);
    if (!chip) return;
    chip.setAttribute("aria-pressed", on);
    row.classList.toggle("current", on);
  }

  function select(index) {
    index = Math.max(0, Math.min(data.tokens.length - 1, index));
    const token = data.tokens[index], before = selected;
    mark(before, false);
    mark(index, true);
    selected = index;
    byId("readout").textContent = token.about;
    byId("name").replaceChildren(...tokenText(token.text));
    byId("token").value = index;
    byId("previous").disabled = index === 0;
    byId("next").disabled = index === data.tokens.length - 1;
    byId("facts").replaceChildren(...token.facts.map(([name, value]) =>
      element("div", "", element("dt", "", name), element("dd", "", value))));
    const empty = !token.blocks.length;
    byId("blocks").replaceChildren(...(empty ? [zero(3)] : token.blocks.map(blockRow)));
    byId("rows").replaceChildren(...(empty ? [zero(2)] : token.rows.map((unit) => unitRow("reads", unit))));
    byId("columns").replaceChildren(...(empty ? [zero(2)] : token.columns.map((unit) => unitRow("writes", unit))));
    emphasise(before);
  }

  // The selected token's bar gets an outline, its spectrum a bold line; deselected, it is shown or hidden as before.
  function emphasise(before) {
    const bars = data.tokens.map((_, i) => (i === selected ? 2.5 : 0));
    Plotly.restyle("shares", { "marker.line.width": [bars], "marker.line.color": colour("--ink") });
    const traces = byId("spectra").data;
    const find = (token) => traces.findIndex((trace) => trace.meta === token);
    const last = find(before);
    if (last >= 0) Plotly.restyle("spectra", { "line.width": 1.5, visible: shownBefore }, [last]);
    const now = find(selected);
    if (now < 0) return;
    shownBefore = traces[now].visible;
    Plotly.restyle("spectra", { "line.width": 4, visible: true }, [now]);
  }

  const narrow = matchMedia("(max-width: 560px)");
  draw(data.figures, plots, (plot, layout) => {
    if (plot === "spectra" && narrow.matches) layout.legend = { orientation: "h", y: -0.2, maxheight: 0.25 };
  }, () => Plotly.restyle("shares", { "marker.line.color": colour("--ink") }));

  byId("shares").on("plotly_click", (event) => {
    if (event.points[0].x < data.tokens.length) select(event.points[0].x);
  });
  for (const chip of document.querySelectorAll(".chip")) {
    const index = Number(chip.dataset.token);
    chip.addEventListener("click", () => select(index));
    const show = () => { byId("readout").textContent = data.tokens[index].about; };
    chip.addEventListener("mouseenter", show);
    chip.addEventListener("focus", show);
    chip.addEventListener("mouseleave", () => { byId("readout").textContent = data.tokens[selected].about; });
  }
  for (const row of document.querySelectorAll("tr[data-token]"))
    row.addEventListener("click", () => select(Number(row.dataset.token)));
  byId("token").addEventListener("change", (event) => select(Number(event.target.value)));
  byId("previous").addEventListener("click", () => select(selected - 1));
  byId("next").addEventListener("click", () => select(selected + 1));
  byId("scores").addEventListener("change", (event) => document.body.classList.toggle("scored", event.target.checked));
  select(data.selected);
})();
