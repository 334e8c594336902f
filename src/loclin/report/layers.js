(() => {
  const data = JSON.parse(byId("data").textContent);
  const plots = ["depth", "spectra", "path", "ranks", "own"];
  let component = data.components.length - 1, token = data.position;

  function hits(side, list) {
    const line = words(side, list);
    const made = element("div", side, ...line.childNodes);
    for (const hit of made.children)
      if (hit.firstChild.textContent === data.target) hit.classList.add("target");
    return made;
  }

  function vector(block) {
    if (!block) return element("td");
    const sigma = element("div", "sigma", element("b", "", block.name), " " + block.values + " ");
    sigma.append(block.near ? element("small", "near", "near-equal: one space")
      : element("small", "", block.gain === null ? "" : "v·x " + block.gain));
    return element("td", "", sigma, ...(block.reads.length ? [hits("reads", block.reads)] : []), hits("writes", block.writes));
  }

  function lens(layer) {
    return element("td", "lens", element("div", "sigma", element("small", "", layer.probability + ", rank " + layer.rank)),
      hits("writes", layer.words));
  }

  function row(map, layer) {
    const name = element("th", "", element("b", "", layer), element("small", "", "stable rank " + map.rank));
    name.scope = "row";
    const cells = map.blocks.length ? [0, 1, 2].map((i) => vector(map.blocks[i]))
      : [element("td", "note", "The map of this token is zero: nothing it holds reaches this position.")];
    if (!map.blocks.length) cells[0].colSpan = 3;
    return element("tr", "", name, ...cells, lens(data.lens[layer]));
  }

  function table() {
    const chosen = data.components[component];
    byId("name").replaceChildren(...(token < 0 ? ["all tokens"] : tokenText(data.tokens[token])));
    byId("layers").replaceChildren(...(token < 0 ? chosen.joint : chosen.tokens[token]).map(row));
  }

  function chooseComponent(index) {
    component = index;
    const { name, title } = data.components[component];
    for (const choice of document.querySelectorAll("select.component")) choice.value = component;
    for (const place of document.querySelectorAll(".of")) place.textContent = title;
    for (const plot of ["spectra", "path", "depth"])
      Plotly.restyle(plot, { visible: byId(plot).data.map((trace) => !trace.meta || trace.meta === name) });
    table();
  }

  // The dotted curves of C and D are those of the chosen token.
  function chooseToken(index) {
    token = index;
    byId("token").value = token;
    for (const chip of document.querySelectorAll(".chip"))
      chip.setAttribute("aria-pressed", Number(chip.dataset.token) === token);
    for (const plot of ["ranks", "own"])
      byId(plot).data.forEach((trace, i) => {
        if (!trace.meta.chosen) return;
        const of = data.components.find((one) => one.name === trace.meta.component);
        Plotly.restyle(plot, { y: [token < 0 ? [] : of[plot][token]] }, [i]);
      });
    table();
  }

  draw(data.figures, plots);
  for (const choice of document.querySelectorAll("select.component"))
    choice.addEventListener("change", () => chooseComponent(Number(choice.value)));
  for (const chip of document.querySelectorAll(".chip"))
    chip.addEventListener("click", () => chooseToken(Number(chip.dataset.token)));
  byId("token").addEventListener("change", (event) => chooseToken(Number(event.target.value)));
  byId("scores").addEventListener("change", (event) => document.body.classList.toggle("scored", event.target.checked));
  chooseComponent(component);
  chooseToken(token);
})();
