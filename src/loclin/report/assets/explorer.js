(async () => {
  const data = JSON.parse(byId("data").textContent);
  const R = data.rows.length, C = data.components.length, N = data.words.length, MEAN = N, NONE = -1;
  const COLOURS = ["#3b82f6", "#ea6a12", "#12a150", "#a855f7", "#e0457b", "#0ea5b7", "#b58900", "#7c86f0"];
  const LOG = Math.log10;

  // ---- what the file holds ------------------------------------------------------------------------------------------
  function fail(why) {
    byId("failed").textContent = why;
    byId("failed").hidden = false;
    byId("table").open = true;
  }
  if (typeof DecompressionStream === "undefined") {
    fail("This browser has no DecompressionStream, with which the page reads its vectors: open it with a newer one. Below are the shares of the predicted word.");
    return;
  }

  async function unpack() {
    const text = byId("blob").textContent;
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // The lowest bytes of all numbers come first, then the next ones; the sign is the lowest bit.
  function whole(planes, name) {
    const { at, size, shape } = data.arrays[name];
    const count = shape.reduce((a, b) => a * b, 1);
    if (at + count * size > planes.length) throw new RangeError(`${name} is cut short`);
    const made = new { 1: Int8Array, 2: Int16Array, 3: Int32Array, 4: Int32Array }[size](count);
    for (let i = 0; i < count; i++) {
      let value = 0;
      for (let byte = size - 1; byte >= 0; byte--) value = value * 256 + planes[at + byte * count + i];
      made[i] = value % 2 ? -(value + 1) / 2 : value / 2;
    }
    return made;
  }

  let cells, heads, rows, ranks, lens, lensRanks;
  try {
    const planes = await unpack();
    [cells, heads, rows, ranks, lens, lensRanks] =
      ["cells", "heads", "rows", "ranks", "lens", "lensRanks"].map((name) => whole(planes, name));
    const d = data.arrays.rows.shape[1];
    const fits = data.weights.length === d && cells.length === (R + 1) * C * d && rows.length === (N + 1) * d && heads.length === data.heads.length * d;
    if (!fits || ![...data.offsets.slice(0, N), ...data.logits.slice(0, N), ...data.weights].every(Number.isFinite)) throw new RangeError("its numbers do not fit together");
  } catch (error) {
    fail(`The page's vectors cannot be read (${error.message}): it was altered or cut short. Make it again with loclin explore.`);
    return;
  }
  const D = data.arrays.rows.shape[1], M = data.arrays.lensRanks.shape[2], L = data.arrays.ranks.shape[0];
  const P = data.lensAt.length, K = data.arrays.lens.shape[2];
  const hasMean = Number.isFinite(data.logits[MEAN]);
  const wordOf = new Map(data.ids.map((id, i) => [id, i]));
  const nameOf = (i) => (i === MEAN ? "mean of all" : data.words[i]);

  // Components by layer: the last layer on top, the embeddings at the bottom.
  const layers = [];
  data.components.forEach((name, c) => {
    const [kind, layer] = name.split(".");
    const key = kind === "embed" ? -1 : kind === "norm" ? 1e9 : Number(layer);
    const held = layers.find((one) => one.key === key);
    if (held) held.parts.push({ kind, c });
    else layers.push({ key, name: layer ?? kind, parts: [{ kind, c }] });
  });
  layers.sort((a, b) => b.key - a.key);
  const KINDS = { embed: "embedding", attn_out: "attention", mlp_out: "MLP", block: "layer", norm: "final norm" };
  const spell = (c) => {
    const [kind, layer] = data.components[c].split(".");
    return layer === undefined ? KINDS[kind] : `${KINDS[kind]} ${layer}`;
  };
  const headAt = data.heads.map((name) => name.match(/^L(\d+)H(\d+)$/).slice(1).map(Number));

  // ---- sums ---------------------------------------------------------------------------------------------------------
  // Products of vectors with a direction, four at a time: each of its numbers is read once for all four.
  function products(vectors, count, direction) {
    const found = new Float64Array(count);
    let k = 0;
    for (; k + 3 < count; k += 4) {
      const [o0, o1, o2, o3] = [k * D, (k + 1) * D, (k + 2) * D, (k + 3) * D];
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let j = 0; j < D; j++) {
        const w = direction[j];
        s0 += vectors[o0 + j] * w;
        s1 += vectors[o1 + j] * w;
        s2 += vectors[o2 + j] * w;
        s3 += vectors[o3 + j] * w;
      }
      found[k] = s0;
      found[k + 1] = s1;
      found[k + 2] = s2;
      found[k + 3] = s3;
    }
    for (; k < count; k++) for (let j = 0; j < D; j++) found[k] += vectors[k * D + j] * direction[j];
    return found;
  }

  // The product of a sum of parts with every word's row.
  const scored = (vector, of = rows.subarray(0, N * D)) => products(of, of.length / D, data.weights.map((weight, j) => weight * vector[j]));

  function goal(word, minus) {
    const direction = new Float64Array(D);
    for (let j = 0; j < D; j++) direction[j] = (rows[word * D + j] - (minus === NONE ? 0 : rows[minus * D + j])) * data.weights[j];
    const less = (list) => list[word] - (minus === NONE ? 0 : list[minus]);
    return { direction, offset: less(data.offsets), value: less(data.logits) };
  }

  function ask(word, minus) {
    const { direction, offset, value } = goal(word, minus);
    const shares = products(cells, (R + 1) * C, direction), own = products(heads, data.heads.length, direction);
    const byRow = new Float64Array(R + 1), byComponent = new Float64Array(C);
    for (let r = 0; r <= R; r++)
      for (let c = 0; c < C; c++) { byRow[r] += shares[r * C + c]; byComponent[c] += shares[r * C + c]; }
    const tokens = byRow.subarray(0, R).reduce((a, b) => a + b, 0), biases = byRow[R] + offset;
    return { direction, offset, value, shares, heads: own, byRow, byComponent, tokens, biases, rounding: value - tokens - biases };
  }

  // What is taken out, as one vector: whole rows and columns of cells, each cell once, and heads of other components.
  function taken() {
    const vector = new Float64Array(D), { rows: outRows, components, heads: outHeads } = state.out;
    for (let r = 0; r <= R; r++)
      for (let c = 0; c < C; c++)
        if (outRows.has(r) || components.has(c))
          for (let j = 0, o = (r * C + c) * D; j < D; j++) vector[j] += cells[o + j];
    for (const h of outHeads)
      if (!components.has(data.components.indexOf(`attn_out.${headAt[h][0]}`)))
        for (let j = 0; j < D; j++) vector[j] += heads[h * D + j];
    return vector;
  }

  // ---- state, which is all in the address ---------------------------------------------------------------------------
  const best = data.logits.slice(0, N).reduce((b, value, i) => (value > data.logits[b] ? i : b), 0);
  const fresh = () => ({
    word: best, minus: hasMean ? MEAN : NONE, pins: [best], unit: "", spans: [], fold: false, show: "both",
    cell: [Math.max(0, data.rows.findIndex((row) => row.at.includes(data.position))), layers.findIndex((layer) => layer.key < 1e9)], head: null, out: { rows: new Set(), components: new Set(), heads: new Set() },
  });
  let state = fresh(), now = null;

  function written() {
    const given = new URLSearchParams(), { out } = state;
    given.set("w", data.ids[state.word]);
    given.set("m", state.minus === MEAN ? "mean" : state.minus === NONE ? "none" : data.ids[state.minus]);
    given.set("pin", state.pins.map((i) => data.ids[i]).join("."));
    if (state.unit) given.set("by", state.unit);
    if (state.spans.length) given.set("span", state.spans.map((span) => span.join("-")).join("."));
    if (state.fold) given.set("fold", 1);
    given.set("show", state.show);
    given.set("cell", state.cell.join("."));
    if (state.head !== null) given.set("head", state.head);
    for (const [name, held] of Object.entries(out)) if (held.size) given.set("no-" + name, [...held].join("."));
    return "#" + given;
  }

  function remember() {
    try { history.replaceState(null, "", written()); } catch { /* a frame without an address */ }
  }

  function recall() {
    const given = new URLSearchParams(location.hash.slice(1)), made = fresh();
    const numbers = (name, most) => (given.get(name) ?? "").split(".").filter((t) => /^\d+$/.test(t)).map(Number).filter((i) => i < most);
    const word = (name) => wordOf.get(Number(given.get(name) || NaN));
    if (given.has("w")) made.word = word("w") ?? made.word;
    if (given.get("m") === "none") made.minus = NONE;
    else if (given.has("m") && given.get("m") !== "mean") made.minus = word("m") ?? made.minus;
    if (given.has("pin")) made.pins = [...new Set(numbers("pin", Infinity).map((id) => wordOf.get(id)).filter((i) => i !== undefined))];
    if (Object.hasOwn(data.units, given.get("by"))) made.unit = given.get("by");
    made.fold = given.has("fold");
    made.spans = (given.get("span") ?? "").split(".").map((s) => s.split("-").map(Number)).filter(([a, b]) => a >= 0 && a <= b && b < R);
    if ([...byId("show").options].some((o) => o.value === given.get("show"))) made.show = given.get("show");
    const [r, l] = numbers("cell", Infinity);
    if (r <= R && l < layers.length) made.cell = [r, l];
    made.head = numbers("head", data.heads.length)[0] ?? null;
    for (const [name, most] of [["rows", R + 1], ["components", C], ["heads", data.heads.length]])
      made.out[name] = new Set(numbers("no-" + name, most));
    if (made.out.rows.size) made.out.heads.clear();
    state = made;
  }

  // ---- small things -------------------------------------------------------------------------------------------------
  const signed = (v) => (v < 0 ? "−" : "+") + (Math.abs(v) > 0 && Math.abs(v) < 5e-4 ? Math.abs(v).toExponential(0) : Math.abs(v).toFixed(3));
  const plainNumber = (v) => (v < 0 ? "−" : "") + Math.abs(v).toPrecision(5);
  const word = (text) => element("span", "word", ...tokenText(text));
  function button(text, run, className = "") {
    const made = element("button", className, text);
    made.type = "button";
    made.addEventListener("click", run);
    return made;
  }
  const goalName = () => nameOf(state.word) + (state.minus === NONE ? "" : " − " + nameOf(state.minus));
  // Asking for a style takes long: once for all that is drawn.
  const look = {};
  function relook() {
    const style = getComputedStyle(document.body);
    for (const name of ["ink", "soft", "card", "grid", "bad"]) look[name] = style.getPropertyValue("--" + name).trim();
    for (const name of ["pos", "neg"]) look[name] = style.getPropertyValue("--" + name).trim().split(" ").join(",");
    look.font = style.fontFamily;
  }
  const tint = (depth) => `rgba(${depth < 0 ? look.neg : look.pos},${(0.85 * Math.sqrt(Math.min(1, Math.abs(depth)))).toFixed(3)})`;

  // Units: what the shares of tokens are added up to. Each row is in exactly one.
  function units() {
    const labels = new Array(R).fill(null), found = new Map(), made = [];
    const [owner, names] = data.units[state.unit] ?? [null, null];
    state.spans.forEach(([a, b], s) => { for (let r = a; r <= b; r++) labels[r] = `span ${s}`; });
    for (let r = 0; r < R; r++) {
      const apart = data.rows[r].sink || data.rows[r].special;
      if (state.fold && apart) labels[r] = "folded";
      else labels[r] ??= owner ? `${state.unit} ${owner[r]}` : `row ${r}`;
      if (!found.has(labels[r])) { found.set(labels[r], made.length); made.push({ rows: [], label: labels[r] }); }
      made[found.get(labels[r])].rows.push(r);
    }
    for (const unit of made) {
      const texts = unit.rows.map((r) => data.rows[r].text), [kind, number] = unit.label.split(" ");
      unit.other = kind === "folded";
      unit.name = unit.other ? `${unit.rows.length} folded: ${texts.join(" ")}`.slice(0, 40)
        : kind === "span" ? texts.join("") : kind === "row" ? texts[0] : names[number];
      unit.sink = unit.rows.some((r) => data.rows[r].sink);
    }
    made.push({ rows: [R], label: "biases", name: "biases", other: true, sink: true });
    return made;
  }
  const shareOf = (unit) => unit.rows.reduce((sum, r) => sum + now.byRow[r], unit.rows[0] === R ? now.offset : 0);
  const fullOf = (list) => Math.max(...list.filter(([, apart]) => !apart).map(([v]) => Math.abs(v)), 0) ||
    Math.max(...list.map(([v]) => Math.abs(v)), 1e-30);

  function takeOut(kind, members, on = null) {
    const held = state.out[kind], add = on ?? !members.every((i) => held.has(i));
    const other = kind === "rows" ? state.out.heads : kind === "heads" ? state.out.rows : null;
    if (add && other?.size) {
      say("Tokens and heads cannot be out together: the page does not have what a head writes of each token. Put the others back first.");
      return;
    }
    for (const i of members) add ? held.add(i) : held.delete(i);
    render();
  }

  let saying = "";
  function say(text) { saying = text; byId("missing").textContent = text; }

  function choose(i, minus = state.minus) {
    if (i === MEAN) { say("The mean of all logits can only be taken away."); return; }
    state.word = i;
    state.minus = minus === i ? (hasMean ? MEAN : NONE) : minus;
    say("");
    render();
  }
  function pin(i) {
    state.pins = state.pins.includes(i) ? state.pins.filter((one) => one !== i) : [...state.pins, i].slice(-COLOURS.length);
    render();
  }

  // What a vector writes most: among the page's words.
  function writes(vector, most = 8) {
    const scores = scored(vector), order = [...scores.keys()];
    const mean = hasMean ? scored(vector, rows.subarray(N * D))[0] : 0;
    order.sort((a, b) => scores[b] - scores[a]);
    return order.slice(0, most).map((i) => [i, scores[i] - mean]);
  }
  function wordButtons(list, label) {
    const cell = element("p", "", label + " ");
    for (const [i, score] of list) {
      const hit = button(word(nameOf(i)), () => choose(i), "hit" + (score < 0 ? " neg" : ""));
      hit.title = `${signed(score)}; choose it`;
      cell.append(hit, " ");
    }
    return cell;
  }

  // ---- choosing words -----------------------------------------------------------------------------------------------
  const bare = (text) => text.replace(/[·\s]/g, "").toLowerCase();
  const bareWords = data.words.map(bare);
  function matches(typed, extra = []) {
    const asked = bare(typed), exact = typed.replace(/ /g, "·");
    const rank = (i) => {
      if (i === MEAN || i === NONE) return extra.includes(i) && (!asked || bare(i === MEAN ? "mean of all" : "nothing").includes(asked)) ? 0 : 9;
      if (data.words[i] === exact) return 1;
      if (bareWords[i] === asked) return 2;
      return bareWords[i].startsWith(asked) ? 3 : bareWords[i].includes(asked) ? 4 : 9;
    };
    const found = [...extra, ...Array(N).keys()].map((i) => [rank(i), i]).filter(([r]) => r < 9);
    return found.sort((a, b) => a[0] - b[0]).map(([, i]) => i);
  }
  function lookUp(typed) {
    const exact = typed.replace(/ /g, "·");
    const same = data.words.indexOf(exact) >= 0 ? data.words.indexOf(exact) : data.words.findIndex((text) => text.replace(/^·/, "") === exact.replace(/^·/, ""));
    return same < 0 ? null : same;
  }
  function missing(typed) {
    const quoted = JSON.stringify(typed.replaceAll("·", " "));
    say(`${quoted} is not among the ${N} words of this page. It is added by: loclin explore PROMPT --word ${quoted} --html page.html`);
  }

  // A field with a list of words below it, as WAI-ARIA describes one.
  function combo(input, { extra = [], current, pick }) {
    const list = element("ul", "options");
    list.id = input.id + "-options";
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", "words of this page");
    list.hidden = true;
    input.after(list);
    for (const [name, value] of [["role", "combobox"], ["aria-autocomplete", "list"], ["aria-controls", list.id], ["aria-expanded", "false"]])
      input.setAttribute(name, value);
    let shown = [], at = -1;
    const title = (i) => (i === NONE ? "nothing" : nameOf(i));
    function mark(next) {
      at = next;
      [...list.children].forEach((item, i) => item.setAttribute("aria-selected", i === at));
      if (at >= 0) { input.setAttribute("aria-activedescendant", list.children[at].id); list.children[at].scrollIntoView({ block: "nearest" }); }
      else input.removeAttribute("aria-activedescendant");
    }
    function open(typed) {
      shown = matches(typed, extra).slice(0, 40);
      list.replaceChildren(...shown.map((i, number) => {
        const item = element("li", "", i < 0 ? element("i", "", title(i)) : word(title(i)), element("small", "", i < 0 || !Number.isFinite(data.logits[i]) ? "" : data.logits[i].toFixed(2)));
        item.id = `${list.id}-${number}`;
        item.setAttribute("role", "option");
        item.addEventListener("mousedown", (event) => { event.preventDefault(); done(i); });
        return item;
      }));
      list.hidden = !shown.length;
      input.setAttribute("aria-expanded", !list.hidden);
      mark(-1);
    }
    function close() {
      list.hidden = true;
      input.setAttribute("aria-expanded", false);
      input.removeAttribute("aria-activedescendant");
      at = -1;
    }
    function done(i) { finish(() => pick(i)); }
    function finish(act) {
      close();
      act();
      input.value = current();
      if (document.activeElement === input) input.select(); // the next word is typed over this one
    }
    function enter() {
      if (at >= 0) return done(shown[at]);
      const typed = input.value, [a, b] = typed.split(/\s[−–-]\s/, 2);
      const special = extra.find((i) => bare(title(i)) === bare(typed));
      if (special !== undefined && lookUp(typed) === null) return done(special);
      const one = lookUp(typed);
      if (one !== null) return done(one);
      if (b !== undefined && input.id === "word") {
        const [first, second] = [lookUp(a), /^mean/i.test(b) && hasMean ? MEAN : lookUp(b)];
        if (first !== null && second !== null) return finish(() => choose(first, second));
        return missing(first === null ? a : b);
      }
      return typed.trim() ? missing(typed) : done(extra[0] ?? state.word);
    }
    input.addEventListener("focus", () => { input.select(); open(""); });
    input.addEventListener("input", () => open(input.value));
    input.addEventListener("blur", () => { close(); input.value = current(); });
    input.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        if (list.hidden) open(input.value);
        if (shown.length) mark((at + (event.key === "ArrowDown" ? 1 : at < 0 ? shown.length : shown.length - 1)) % shown.length);
      } else if (event.key === "Enter") { event.preventDefault(); enter(); }
      else if (event.key === "Escape") { close(); input.value = current(); }
    });
    return () => { if (document.activeElement !== input || list.hidden) input.value = current(); };
  }

  // ---- panels -------------------------------------------------------------------------------------------------------
  function renderSum() {
    const part = (value, name) => element("span", "part", signed(value), element("small", "", name));
    const sum = [part(now.tokens, data.by === "token" ? "tokens" : `${data.by}s`), part(now.biases, "biases"), part(now.rounding, "rounding")];
    const value = element("b", "", plainNumber(now.value)), made = [word(goalName()), "=", ...sum, "=", value];
    if (isOut()) made.push(element("span", "part", "· frozen without what is out: ", element("b", "", plainNumber(now.value - now.gone))));
    byId("sum").replaceChildren(...made.map((one) => (one === "=" ? element("span", "", "=") : one)));
    byId("missing").textContent = saying;
  }

  function renderNext() {
    const most = Math.max(...data.predictions.map(([, , p]) => p), 1e-9);
    byId("next").replaceChildren(...data.predictions.slice(0, 10).map(([id, text, p]) => {
      const i = wordOf.get(id);
      const fill = element("span", "fill");
      fill.style.width = (100 * p) / most + "%";
      const row = button("", () => choose(i), "row");
      row.replaceChildren(word(text), element("span", "track", fill), element("span", "number", (100 * p).toFixed(1) + " %"),
        element("span", "number logit", i === undefined ? "" : data.logits[i].toFixed(2)));
      row.disabled = i === undefined;
      row.setAttribute("aria-pressed", i === state.word);
      const pinned = button(state.pins.includes(i) ? "pinned" : "pin", () => pin(i), "pin");
      pinned.setAttribute("aria-pressed", state.pins.includes(i));
      pinned.setAttribute("aria-label", `pin ${text}`);
      pinned.disabled = i === undefined;
      return element("li", "", row, pinned);
    }));
  }

  const isOut = () => Object.values(state.out).some((held) => held.size);
  function renderFrozen() {
    const box = byId("frozen"), { out } = state;
    if (!isOut()) {
      box.replaceChildren(element("p", "", "Nothing is out. Choose a token, a cell or a head, and press Delete or its button."));
      return;
    }
    const list = element("ul", "gone");
    const row = (name, what, value, back) => list.append(element("li", "", element("span", "", name, " ", element("small", "dim", what)), element("span", "", signed(-value)), button("put back", back)));
    for (const r of out.rows) row(r === R ? "biases" : word(data.rows[r].text), "total effect", now.byRow[r] + (r === R ? now.offset : 0), () => takeOut("rows", [r], false));
    for (const c of out.components) row(spell(c), "direct effect", now.byComponent[c], () => takeOut("components", [c], false));
    for (const h of out.heads) row(data.heads[h], "direct effect", now.heads[h], () => takeOut("heads", [h], false));
    const vector = now.taken, before = data.logits, after = scored(vector).map((v, i) => before[i] - v - (out.rows.has(R) ? data.offsets[i] : 0));
    const top = (scores) => [...Array(N).keys()].sort((a, b) => scores[b] - scores[a]).slice(0, 5);
    box.replaceChildren(
      element("p", "big", word(goalName()), " ", plainNumber(now.value), " → ", element("b", "", plainNumber(now.value - now.gone))),
      list,
      wordButtons(top(before).map((i) => [i, before[i]]), "first words before:"),
      wordButtons(top(after).map((i) => [i, after[i]]), "frozen says:"),
      button("put everything back", () => { for (const held of Object.values(out)) held.clear(); render(); }),
    );
    if (out.rows.size && out.components.size) box.append(element("p", "note", "Where a token and a component cross, the cell is taken out once."));
  }

  let shownUnits = [], focus = 0, anchor = 0;
  function renderTokens() {
    shownUnits = units();
    focus = Math.min(focus, shownUnits.length - 1);
    anchor = Math.min(anchor, shownUnits.length - 1);
    const values = shownUnits.map(shareOf), full = fullOf(values.map((v, i) => [v, shownUnits[i].sink || shownUnits[i].other]));
    const box = byId("chips"), had = box.contains(document.activeElement);
    const [from, to] = [Math.min(anchor, focus), Math.max(anchor, focus)];
    box.replaceChildren(...shownUnits.map((unit, i) => {
      const chip = element("button", "chip" + (values[i] < 0 ? " neg" : "") + (unit.sink && unit.rows[0] !== R ? " sink" : "") + (unit.other ? " other" : ""),
        element("span", "", ...tokenText(unit.name)), element("small", "", signed(values[i])));
      chip.type = "button";
      chip.tabIndex = i === focus ? 0 : -1;
      chip.style.setProperty("--a", (0.7 * Math.min(1, Math.abs(values[i]) / full)).toFixed(3));
      chip.dataset.unit = i;
      const out = unit.rows.every((r) => state.out.rows.has(r));
      chip.classList.toggle("out", out);
      chip.classList.toggle("marked", i >= from && i <= to);
      chip.setAttribute("aria-pressed", out);
      return chip;
    }));
    if (had) box.children[focus].focus();
    renderChosen();
    const options = [["", data.by === "token" ? "nothing: each token" : `nothing: each ${data.by}`], ...Object.keys(data.units).map((name) => [name, name])];
    byId("unit").replaceChildren(...options.map(([value, text]) => { const made = element("option", "", text); made.value = value; return made; }));
    byId("unit").value = state.unit;
    byId("fold").checked = state.fold;
  }

  function renderChosen() {
    const [from, to] = [Math.min(anchor, focus), Math.max(anchor, focus)], some = shownUnits.slice(from, to + 1);
    const members = some.flatMap((unit) => unit.rows), share = some.reduce((sum, unit) => sum + shareOf(unit), 0);
    const all = Math.abs(now.value) > 1e-9 ? `, ${((100 * share) / now.value).toFixed(1)} % of the whole` : "";
    const name = some.length > 1 ? element("span", "", `${some.length} marked `) : word(some[0].name);
    const made = [name, element("span", "", `${signed(share)}${all}`)];
    const out = members.every((r) => state.out.rows.has(r));
    made.push(button(out ? "put back" : "take out", () => takeOut("rows", members)));
    if (some.length > 1 && !members.includes(R)) made.push(button("make one group", () => {
      const span = [Math.min(...members), Math.max(...members)];
      state.spans = [...state.spans.filter(([a, b]) => b < span[0] || a > span[1]), span];
      anchor = focus = from;
      render();
    }));
    if (state.spans.length) made.push(button("undo groups", () => { state.spans = []; render(); }));
    byId("chosen").replaceChildren(...made);
  }

  function moveTo(i, extend) {
    focus = Math.max(0, Math.min(shownUnits.length - 1, i));
    if (!extend) anchor = focus;
    const [from, to] = [Math.min(anchor, focus), Math.max(anchor, focus)];
    [...byId("chips").children].forEach((chip, k) => { chip.tabIndex = k === focus ? 0 : -1; chip.classList.toggle("marked", k >= from && k <= to); });
    renderChosen();
    state.cell = [shownUnits[focus].rows.at(-1), state.cell[1]];
    grid.draw();
    renderCell();
    remember();
  }

  // ---- boards: cells on a canvas, of which the visible ones are drawn ----------------------------------------------
  function board(box, what) {
    const canvas = element("canvas"), space = element("div", "space");
    canvas.setAttribute("aria-hidden", "true");
    box.append(canvas, space);
    let layout = null;

    function paint(context, area, width, height, left, top) {
      const { columns, lines, w, h, x0, y0 } = area, { ink, soft } = look;
      context.fillStyle = look.card;
      context.fillRect(0, 0, width, height);
      context.font = "12px " + look.font;
      context.textBaseline = "middle";
      const c0 = Math.max(0, Math.floor(left / w)), c1 = Math.min(columns.length, Math.ceil((left + width - x0) / w));
      const l0 = Math.max(0, Math.floor(top / h)), l1 = Math.min(lines.length, Math.ceil((top + height - y0) / h));
      const at = what.at();
      for (let l = l0; l < l1; l++) {
        for (let c = c0; c < c1; c++) {
          const cell = what.cell(c, l);
          if (!cell) continue;
          const [x, y] = [x0 + c * w - left, y0 + l * h - top];
          if (cell.fill) { context.fillStyle = cell.fill; context.fillRect(x + 0.5, y + 0.5, w - 1, h - 1); }
          if (cell.text) {
            context.fillStyle = ink;
            context.textAlign = "center";
            context.fillText(cut(context, cell.text, w - 4), x + w / 2, y + h / 2);
          }
          if (cell.out) { context.strokeStyle = look.bad; context.lineWidth = 1.5; context.beginPath(); context.moveTo(x + 2, y + h / 2); context.lineTo(x + w - 2, y + h / 2); context.stroke(); }
        }
      }
      if (at) {
        context.strokeStyle = ink;
        context.lineWidth = 2;
        context.strokeRect(x0 + at[0] * w - left + 1, y0 + at[1] * h - top + 1, w - 2, h - 2);
      }
      context.fillStyle = look.card;
      context.fillRect(0, 0, x0, height);
      context.fillRect(0, 0, width, y0);
      context.fillStyle = soft;
      context.textAlign = "right";
      for (let l = l0; l < l1; l++) {
        const y = y0 + (l + 0.5) * h - top;
        if (y > y0 && (h >= 12 || l % Math.ceil(12 / h) === 0)) context.fillText(lines[l], x0 - 6, y);
      }
      for (let c = c0; c < c1; c++) {
        const x = x0 + (c + 0.5) * w - left;
        if (x < x0 || (w < 12 && c % Math.ceil(12 / w))) continue;
        context.save();
        context.fillStyle = at && at[0] === c ? ink : soft;
        if (area.flat) { context.textAlign = "center"; context.fillText(cut(context, columns[c], w - 4), x, y0 - 10); }
        else {
          context.textAlign = "left";
          context.translate(x + 2, y0 - 6);
          context.rotate(-Math.PI / 3);
          context.fillText(cut(context, columns[c], 76), 0, 0);
        }
        context.restore();
      }
    }

    function draw() {
      layout = what.layout(Math.max(200, box.clientWidth));
      const width = layout.x0 + layout.columns.length * layout.w + layout.right, height = layout.y0 + layout.lines.length * layout.h + 4;
      space.style.width = width + "px";
      space.style.height = height + "px";
      const wide = Math.min(box.clientWidth, width), high = Math.min(height, 690), scale = devicePixelRatio || 1;
      if (canvas.width !== Math.round(wide * scale) || canvas.height !== Math.round(high * scale)) {
        canvas.width = Math.round(wide * scale);
        canvas.height = Math.round(high * scale);
        canvas.style.width = wide + "px";
        canvas.style.height = high + "px";
      }
      const context = canvas.getContext("2d");
      context.setTransform(scale, 0, 0, scale, 0, 0);
      paint(context, layout, wide, high, box.scrollLeft, box.scrollTop);
    }
    function find(event) {
      const frame = canvas.getBoundingClientRect(), { x0, y0, w, h, columns, lines } = layout;
      const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
      const [c, l] = [Math.floor((x - x0 + box.scrollLeft) / w), Math.floor((y - y0 + box.scrollTop) / h)];
      return x >= x0 && y >= y0 && c < columns.length && l < lines.length ? [c, l] : null;
    }
    function reveal([c, l]) {
      const { x0, y0, w, h } = layout;
      if (c * w < box.scrollLeft) box.scrollLeft = c * w;
      if (x0 + (c + 1) * w > box.scrollLeft + box.clientWidth) box.scrollLeft = x0 + (c + 1) * w - box.clientWidth;
      if (l * h < box.scrollTop) box.scrollTop = l * h;
      if (y0 + (l + 1) * h > box.scrollTop + box.clientHeight) box.scrollTop = y0 + (l + 1) * h - box.clientHeight;
    }
    box.addEventListener("scroll", draw);
    box.addEventListener("mousemove", (event) => { const cell = find(event); canvas.title = cell ? what.title(...cell) : ""; });
    canvas.addEventListener("click", (event) => { const cell = find(event); if (cell) what.move(...cell); });
    box.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const [c, l] = what.at() ?? [0, 0];
      if (steps) {
        event.preventDefault();
        const next = [Math.max(0, Math.min(layout.columns.length - 1, c + steps[0])), Math.max(0, Math.min(layout.lines.length - 1, l + steps[1]))];
        what.move(...next);
        reveal(next);
        draw();
      } else if (event.key === "Delete" || event.key === "Backspace") { event.preventDefault(); what.out(c, l); }
    });
    return {
      draw,
      // The whole board, for a file; a canvas has an end.
      picture() {
        const area = what.layout(1200), width = Math.min(16000, area.x0 + area.columns.length * area.w + area.right);
        const height = Math.min(8000, area.y0 + area.lines.length * area.h + 4);
        return { width, height, paint: (context) => paint(context, area, width, height, 0, 0) };
      },
    };
  }
  function cut(context, text, width) {
    if (context.measureText(text).width <= width) return text;
    let n = text.length;
    while (n > 1 && context.measureText(text.slice(0, n) + "…").width > width) n--;
    return text.slice(0, n) + "…";
  }

  // Columns are units of tokens and the biases, lines are layers.
  const unitAt = (r) => Math.max(0, shownUnits.findIndex((unit) => unit.rows.includes(r)));
  const wants = (part) => state.show === "both" || part.kind === state.show || !["attn_out", "mlp_out"].includes(part.kind);
  const cellShare = (unit, layer) => layer.parts.filter(wants).reduce((sum, { c }) => sum + unit.rows.reduce((s, r) => s + now.shares[r * C + c], 0), 0);
  const isLens = () => state.show === "lens" || state.show === "rank";
  const lensColumn = (unit) => (unit.rows[0] === R ? -1 : data.lensAt.indexOf(Math.max(...unit.rows.map((r) => data.rows[r].at.at(-1)))));
  const lensLayers = () => layers.filter((layer) => layer.key >= 0 && layer.key < 1e9);
  let boardFull = 1, boardShares = [];
  const gridLines = () => (isLens() ? lensLayers() : layers);
  function rankAt(i, layer, column) {
    if (data.lensAt[column] === data.position) return ranks[layer * N + i];
    return i < M ? lensRanks[(layer * P + column) * M + i] : null;
  }
  const rankTint = (rank) => `rgba(18,161,80,${Math.max(0.04, 0.6 * (1 - LOG(rank) / 3.5)).toFixed(3)})`;
  const grid = board(byId("grid"), {
    layout(room) {
      const count = shownUnits.length, x0 = 52, wide = state.show === "lens" ? 76 : state.show === "rank" ? 52 : 0;
      const w = Math.max(wide || 13, Math.min(92, Math.floor((room - x0 - 48) / count)));
      const flat = w >= 56;
      return { columns: shownUnits.map((unit) => unit.name), lines: gridLines().map((layer) => layer.name), w, h: isLens() ? 21 : 18, x0, y0: flat ? 24 : 84, flat, right: flat ? 2 : 44 };
    },
    cell(c, l) {
      const unit = shownUnits[c], layer = gridLines()[l];
      if (isLens()) {
        const column = lensColumn(unit);
        if (column < 0) return null;
        const rank = rankAt(state.word, layer.key, column);
        const text = state.show === "lens" ? data.lensWords[lens[(layer.key * P + column) * K]] : rank === null ? "" : String(rank);
        return { text, fill: rank === null ? null : rankTint(rank) };
      }
      const value = boardShares[l][c] / boardFull;
      const out = unit.rows.every((r) => state.out.rows.has(r)) || layer.parts.filter(wants).some(({ c: one }) => state.out.components.has(one));
      return { fill: tint(value), out };
    },
    at: () => {
      const l = gridLines().indexOf(layers[state.cell[1]]);
      return l < 0 ? null : [unitAt(state.cell[0]), l];
    },
    title: (c, l) => `${shownUnits[c].name}, layer ${gridLines()[l].name}` + (isLens() ? "" : `: ${signed(boardShares[l][c])}`),
    move(c, l) {
      state.cell = [shownUnits[c].rows.at(-1), layers.indexOf(gridLines()[l])];
      grid.draw();
      renderCell();
      remember();
    },
    out: (c, l) => takeOut("components", gridLines()[l].parts.filter(wants).map((part) => part.c)),
  });

  function renderGrid() {
    boardShares = layers.map((layer) => shownUnits.map((unit) => cellShare(unit, layer)));
    boardFull = fullOf(boardShares.flatMap((line) => line.map((v, c) => [v, shownUnits[c].sink || shownUnits[c].other])));
    for (const option of byId("show").options)
      option.disabled = (["lens", "rank"].includes(option.value) && !P) || (["attn_out", "mlp_out"].includes(option.value) && !layers.some((layer) => layer.parts.some((part) => part.kind === option.value)));
    byId("show").value = state.show;
    const only = P === 1 && R > 1 ? " This long prompt has it at the position of the prediction alone." : "";
    byId("gridnote").textContent = isLens()
      ? `The model's own norm and head at each layer and position. Green: the rank of ${nameOf(state.word)}.${only}` + (state.word >= M && P > 1 ? " Its ranks at other positions are not in this page: --word adds them." : "")
      : "A token's effect along all paths on which the component writes last. Columns sum to tokens, lines to layers. Blue raises, orange lowers.";
    grid.draw();
    renderCell();
  }

  function renderCell() {
    const [r, l] = state.cell, layer = layers[l], unit = shownUnits[unitAt(r)];
    const list = element("dl"), at = element("h3", "", word(unit.name), ` × ${/^\d/.test(layer.name) ? "layer " : ""}${layer.name}`);
    const vector = new Float64Array(D);
    let sum = 0;
    for (const { kind, c } of layer.parts) {
      const share = unit.rows.reduce((s, one) => s + now.shares[one * C + c], 0);
      sum += share;
      list.append(element("dt", "", KINDS[kind]), element("dd", "", signed(share)));
      for (const one of unit.rows) for (let j = 0, o = (one * C + c) * D; j < D; j++) vector[j] += cells[o + j];
    }
    if (layer.parts.length > 1) list.append(element("dt", "", "both"), element("dd", "", signed(sum)));
    const whole = layer.parts.reduce((s, { c }) => s + now.byComponent[c], 0);
    list.append(element("dt", "", "of all tokens and biases"), element("dd", "", signed(whole)));
    const made = [at, list, wordButtons(writes(vector), "writes most:")];
    const column = lensColumn(unit);
    if (layer.key >= 0 && layer.key < 1e9 && column >= 0) {
      const words = [...Array(K).keys()].map((k) => lens[(layer.key * P + column) * K + k]);
      const line = element("p", "", `logit lens at position ${data.lensAt[column]}: `);
      for (const id of words) line.append(wordOf.has(id) ? button(word(data.lensWords[id]), () => choose(wordOf.get(id)), "hit") : word(data.lensWords[id]), " ");
      made.push(line);
      const known = state.pins.map((i) => [i, rankAt(i, layer.key, column)]).filter(([, rank]) => rank !== null);
      if (known.length) made.push(element("p", "", "rank: ", ...known.flatMap(([i, rank]) => [word(nameOf(i)), ` ${rank.toLocaleString("en")}  `])));
    }
    for (const { kind, c } of layer.parts)
      if (!["embed", "norm"].includes(kind)) made.push(button(`${state.out.components.has(c) ? "put back" : "take out"} ${spell(c)}`, () => takeOut("components", [c])), " ");
    byId("cell").replaceChildren(...made);
  }

  const headLayers = [...new Set(headAt.map(([layer]) => layer))].sort((a, b) => b - a);
  const headCount = Math.max(0, ...headAt.map(([, h]) => h + 1));
  const headNumber = new Map(data.heads.map((name, i) => [name, i]));
  const headIn = (c, l) => headNumber.get(`L${headLayers[l]}H${c}`);
  let headFull = 1;
  const headBoard = board(byId("heads"), {
    layout(room) {
      const w = Math.max(13, Math.min(54, Math.floor((room - 52) / Math.max(1, headCount))));
      return { columns: Array.from({ length: headCount }, (_, i) => String(i)), lines: headLayers.map(String), w, h: 15, x0: 40, y0: 22, flat: true, right: 2 };
    },
    cell(c, l) {
      const i = headIn(c, l);
      return i === undefined ? null : { fill: tint(now.heads[i] / headFull), out: state.out.heads.has(i) };
    },
    at: () => (data.heads.length ? [headAt[state.head][1], headLayers.indexOf(headAt[state.head][0])] : null),
    title: (c, l) => (headIn(c, l) === undefined ? "" : `${data.heads[headIn(c, l)]}: ${signed(now.heads[headIn(c, l)])}`),
    move(c, l) {
      state.head = headIn(c, l) ?? state.head;
      headBoard.draw();
      renderHead();
      remember();
    },
    out: () => takeOut("heads", [state.head]),
  });
  function renderHeads() {
    if (!data.heads.length) {
      byId("heads").hidden = true;
      byId("head").textContent = "This model's attention cannot be split into heads.";
      return;
    }
    state.head ??= now.heads.reduce((most, share, i) => (Math.abs(share) > Math.abs(now.heads[most]) ? i : most), 0);
    headFull = Math.max(...now.heads.map(Math.abs), 1e-30);
    headBoard.draw();
    renderHead();
  }
  function renderHead() {
    const i = state.head, name = data.heads[i], largest = [...now.heads.keys()].sort((a, b) => Math.abs(now.heads[b]) - Math.abs(now.heads[a])).slice(0, 6);
    const top = element("p", "", "largest: ");
    for (const one of largest) top.append(button(`${data.heads[one]} ${signed(now.heads[one])}`, () => { state.head = one; renderHeads(); remember(); }, "hit" + (now.heads[one] < 0 ? " neg" : "")), " ");
    byId("head").replaceChildren(
      element("h3", "", `${name} ${signed(now.heads[i])}`), wordButtons(writes(heads.subarray(i * D, (i + 1) * D)), "writes most:"), top,
      button(`${state.out.heads.has(i) ? "put back" : "take out"} ${name}`, () => takeOut("heads", [i])),
    );
  }

  function paintRanks(context, width, height) {
    const [x0, y0, x1, y1] = [52, 10, width - 10, height - 30], most = Math.max(10, ...state.pins.flatMap((i) => [...Array(L).keys()].map((l) => ranks[l * N + i])));
    const x = (l) => x0 + ((x1 - x0) * (L > 1 ? l / (L - 1) : 0.5)), y = (rank) => y0 + ((y1 - y0) * LOG(rank)) / LOG(most);
    context.fillStyle = look.card;
    context.fillRect(0, 0, width, height);
    context.font = "12px " + look.font;
    context.textBaseline = "middle";
    context.lineWidth = 1;
    for (let tick = 1; tick <= most; tick *= 10) {
      context.strokeStyle = look.grid;
      context.beginPath(); context.moveTo(x0, y(tick)); context.lineTo(x1, y(tick)); context.stroke();
      context.fillStyle = look.soft;
      context.textAlign = "right";
      context.fillText(tick.toLocaleString("en"), x0 - 6, y(tick));
    }
    context.textAlign = "center";
    for (let l = 0; l < L; l += Math.max(1, Math.ceil(L / Math.max(4, (x1 - x0) / 50)))) context.fillText(l, x(l), y1 + 14);
    context.fillText("layer", (x0 + x1) / 2, y1 + 25);
    state.pins.forEach((i, number) => {
      context.strokeStyle = context.fillStyle = COLOURS[number];
      context.lineWidth = 2;
      context.beginPath();
      for (let l = 0; l < L; l++) context.lineTo(x(l), y(ranks[l * N + i]));
      context.stroke();
      for (let l = 0; l < L; l++) { context.beginPath(); context.arc(x(l), y(ranks[l * N + i]), 2.6, 0, 7); context.fill(); }
    });
  }
  function sized(canvas) {
    const scale = devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = canvas;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    return [context, width, height];
  }
  function renderRanks() {
    byId("pins").replaceChildren(...state.pins.map((i, number) => {
      const line = element("i");
      line.style.background = COLOURS[number];
      const off = button("×", () => pin(i));
      off.setAttribute("aria-label", `unpin ${nameOf(i)}`);
      return element("span", "", line, word(nameOf(i)), L ? element("small", "dim", `last ${ranks[(L - 1) * N + i].toLocaleString("en")}`) : "", off);
    }));
    byId("ranks").hidden = !L || !state.pins.length;
    byId("ranksnote").textContent = !L ? "There is no logit lens for this task." : `At position ${data.position}, by the model's own norm and head (logit lens); nothing is frozen. Rank 1 is the best.`;
    if (!byId("ranks").hidden) paintRanks(...sized(byId("ranks")));
  }

  // ---- files --------------------------------------------------------------------------------------------------------
  const header = (title) => [`loclin: ${title}`, `shared out: ${goalName()} = ${plainNumber(now.value)}`, ...data.about, location.hash || written()];
  function paintTokens() {
    const values = shownUnits.map(shareOf), full = Math.max(...values.map(Math.abs)), line = 18;
    const width = 900, height = values.length * line + 10;
    return { width, height: Math.min(height, 12000), paint(context) {
      context.font = "13px " + look.font;
      context.textBaseline = "middle";
      values.forEach((value, i) => {
        const y = 5 + i * line, length = (280 * value) / full;
        context.fillStyle = look.ink;
        context.textAlign = "right";
        context.fillText(cut(context, shownUnits[i].name, 200), 210, y + line / 2);
        context.textAlign = "left";
        context.fillText(signed(value), 830, y + line / 2);
        context.fillStyle = `rgb(${value < 0 ? look.neg : look.pos})`;
        context.fillRect(520 + Math.min(0, length), y + 2, Math.abs(length), line - 4);
      });
    } };
  }
  const layerName = (c) => data.components[c];
  const panels = {
    tokens: {
      title: "shares of tokens", picture: paintTokens,
      table: () => [["tokens", "first", "last", "share"], ...shownUnits.map((unit) => [unit.name, ...(unit.rows[0] === R ? ["", ""] : [data.rows[unit.rows[0]].at[0], data.rows[unit.rows.at(-1)].at.at(-1)]), shareOf(unit)]), ["rounding", "", "", now.rounding], ["sum", "", "", now.value]],
    },
    grid: {
      title: "tokens by layers", picture: () => grid.picture(),
      table: () => (isLens()
        ? [["layer", ...shownUnits.map((unit) => unit.name)], ...lensLayers().map((layer) => [layer.name, ...shownUnits.map((unit) => { const column = lensColumn(unit); return column < 0 ? "" : state.show === "lens" ? data.lensWords[lens[(layer.key * P + column) * K]] : rankAt(state.word, layer.key, column) ?? ""; })])]
        : [["component", ...shownUnits.map((unit) => unit.name), "sum"], ...data.components.map((_, c) => [layerName(c), ...shownUnits.map((unit) => unit.rows.reduce((s, r) => s + now.shares[r * C + c], 0)), now.byComponent[c]])]),
    },
    heads: { title: "heads", picture: () => headBoard.picture(), table: () => [["head", "share"], ...data.heads.map((name, i) => [name, now.heads[i]])] },
    ranks: {
      title: "ranks of pinned words",
      picture: () => ({ width: 900, height: 380, paint: (context) => paintRanks(context, 900, 380) }),
      table: () => [["layer", ...state.pins.map(nameOf)], ...[...Array(L).keys()].map((l) => [l, ...state.pins.map((i) => ranks[l * N + i])])],
    },
    frozen: {
      title: "frozen says", picture: () => ({ width: 900, height: 30 + 20 * Math.max(1, outList().length), paint: paintFrozen }),
      table: () => [["out", "effect", "share"], ...outList(), ["frozen logit", "", now.value - now.gone]],
    },
  };
  const outList = () => [
    ...[...state.out.rows].map((r) => [r === R ? "biases" : data.rows[r].text, "total", now.byRow[r] + (r === R ? now.offset : 0)]),
    ...[...state.out.components].map((c) => [layerName(c), "direct", now.byComponent[c]]),
    ...[...state.out.heads].map((h) => [data.heads[h], "direct", now.heads[h]]),
  ];
  function paintFrozen(context) {
    context.fillStyle = look.ink;
    context.font = "13px " + look.font;
    context.textBaseline = "top";
    const list = outList();
    const lines = list.length ? list.map(([name, kind, share]) => `without ${name} (${kind} effect): ${signed(-share)}`) : ["nothing is out"];
    [...lines, `${plainNumber(now.value)} → ${plainNumber(now.value - now.gone)}`].forEach((text, i) => context.fillText(text, 10, 5 + 20 * i));
  }
  function save(name, blob) {
    const link = element("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  // A text that a spreadsheet would read as a formula is kept from it.
  const quoted = (value) => (typeof value === "number" ? String(value) : `"${String(value).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`);
  function csv(panel) {
    const lines = [...header(panels[panel].title).map((text) => `# ${text.replace(/[\r\n]+/g, " ")}`), ...panels[panel].table().map((line) => line.map(quoted).join(","))];
    return lines.join("\n") + "\n";
  }
  function png(panel) {
    const { width, height, paint } = panels[panel].picture(), lines = header(panels[panel].title), top = 12 + 17 * lines.length, scale = width * height > 4e6 ? 1 : 2;
    const canvas = element("canvas"), whole = Math.max(width, 700);
    canvas.width = whole * scale;
    canvas.height = (height + top + 8) * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = look.card;
    context.fillRect(0, 0, whole, height + top + 8);
    context.fillStyle = look.soft;
    context.font = "12px " + look.font;
    context.textBaseline = "top";
    lines.forEach((text, i) => context.fillText(cut(context, text, whole - 20), 10, 8 + 17 * i));
    context.translate(0, top);
    paint(context);
    return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
  }
  for (const tool of document.querySelectorAll("[data-save]")) {
    const { save: kind, panel } = tool.dataset;
    tool.setAttribute("aria-label", `save ${panels[panel].title} as ${kind.toUpperCase()}`);
    tool.addEventListener("click", async () =>
      save(`loclin-${panel}.${kind}`, kind === "csv" ? new Blob([csv(panel)], { type: "text/csv" }) : await png(panel)));
  }

  // ---- all together -------------------------------------------------------------------------------------------------
  const refresh = [];
  function render() {
    const started = performance.now();
    relook();
    now = ask(state.word, state.minus);
    now.taken = isOut() ? taken() : null;
    now.gone = now.taken ? products(now.taken, 1, now.direction)[0] + (state.out.rows.has(R) ? now.offset : 0) : 0;
    renderSum();
    renderNext();
    renderFrozen();
    renderTokens();
    renderGrid();
    renderHeads();
    renderRanks();
    for (const one of refresh) one();
    remember();
    explorer.took = performance.now() - started;
  }
  const explorer = { ask, csv, png, choose, took: 0, opened: 0, get state() { return state; }, get now() { return now; }, words: N, ids: data.ids };
  window.explorer = explorer;

  byId("explorer").hidden = false;
  refresh.push(
    combo(byId("word"), { current: () => nameOf(state.word), pick: (i) => choose(i) }),
    combo(byId("minus"), {
      extra: hasMean ? [NONE, MEAN] : [NONE], current: () => (state.minus === NONE ? "nothing" : nameOf(state.minus)),
      pick: (i) => { state.minus = i === state.word ? NONE : i; say(""); render(); },
    }),
    combo(byId("pin"), { current: () => "", pick: (i) => { if (!state.pins.includes(i)) pin(i); } }),
  );
  byId("unit").addEventListener("change", (event) => { state.unit = event.target.value; focus = anchor = 0; render(); });
  byId("fold").addEventListener("change", (event) => { state.fold = event.target.checked; focus = anchor = 0; render(); });
  byId("show").addEventListener("change", (event) => { state.show = event.target.value; renderGrid(); remember(); });

  const chips = byId("chips");
  const unitOf = (event) => { const chip = event.target.closest(".chip"); return chip ? Number(chip.dataset.unit) : null; };
  let dragged = false;
  chips.addEventListener("pointerdown", (event) => { const i = unitOf(event); if (i !== null && event.pointerType === "mouse") { dragged = true; moveTo(i, event.shiftKey); } });
  chips.addEventListener("pointerover", (event) => { const i = unitOf(event); if (dragged && i !== null && i !== focus) moveTo(i, true); });
  addEventListener("pointerup", () => { dragged = false; });
  chips.addEventListener("click", (event) => { const i = unitOf(event); if (i !== null && !event.shiftKey && anchor === focus) { moveTo(i, false); chips.children[i].focus(); } });
  chips.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -shownUnits.length, End: shownUnits.length }[event.key];
    if (steps) { event.preventDefault(); moveTo(focus + steps, event.shiftKey); chips.children[focus].focus(); }
    else if (event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      takeOut("rows", shownUnits.slice(Math.min(anchor, focus), Math.max(anchor, focus) + 1).flatMap((unit) => unit.rows));
    }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); byId("word").focus(); }
  });
  const redraw = () => { relook(); grid.draw(); if (data.heads.length) headBoard.draw(); renderRanks(); };
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("hashchange", () => { if (location.hash !== written()) { recall(); render(); } });
  recall();
  render();
  explorer.opened = performance.now();
  document.documentElement.dataset.ready = "yes";
})();
