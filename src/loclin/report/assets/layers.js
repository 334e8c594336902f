(() => {
  const data = JSON.parse(byId("data").textContent);
  const plots = ["depth", "spectra", "path", "ranks", "own"];
  let component = data.components.length - 1, token = data.position;

  // Words come as numbers, each with its score behind it where there are scores.
  function hits(side, list, scored = true) {
    const step = scored ? 2 : 1, texts = [];
    for (let i = 0; i < list.length; i += step) texts.push([data.words[list[i]], scored ? list[i + 1] : undefined]);
    const line = words(side, texts);
    const made = element("div", side, ...line.childNodes);
    for (const hit of made.children)
      if (hit.firstChild.textContent === data.target) hit.classList.add("target");
    return made;
  }

  function vector(block, scored) {
    if (!block) return element("td");
    const [name, values, gain, writes, reads] = block;
    const sigma = element("div", "sigma", element("b", "", name), " " + values + " ");
    sigma.append(name.includes("≈") ? element("small", "near", "near-equal: one space")
      : element("small", "", gain === null ? "" : "v·x " + gain));
    return element("td", "", sigma, ...(reads.length ? [hits("reads", reads, scored)] : []), hits("writes", writes, scored));
  }

  function lens(layer) {
    return element("td", "lens", element("div", "sigma", element("small", "", layer.probability + ", rank " + layer.rank)),
      hits("writes", layer.words));
  }

  function row(layer) {
    const chosen = data.components[component];
    const blocks = token < 0 ? chosen.joint[layer] : chosen.tokens[token] && chosen.tokens[token][layer];
    const rank = token < 0 ? chosen.rank[layer] : Number((chosen.ranks[token][layer] || 0).toPrecision(4));
    const name = element("th", "", element("b", "", layer), element("small", "", "stable rank " + rank));
    name.scope = "row";
    if (blocks && blocks.length)
      return element("tr", "", name, ...[0, 1, 2].map((i) => vector(blocks[i], token < 0 || data.scored)), lens(data.lens[layer]));
    const note = element("td", "note", blocks ? "The map of this token is zero: nothing it holds reaches this position."
      : "Left out of this page; the JSON has it.");
    note.colSpan = 3;
    return element("tr", "", name, note, lens(data.lens[layer]));
  }

  function table() {
    byId("name").replaceChildren(...(token < 0 ? ["all tokens"] : tokenText(data.tokens[token])));
    byId("layers").replaceChildren(...data.lens.map((_, layer) => row(layer)));
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
