// The page of `dit-probe report`: draws the maps that are in it. Names come from a store and only ever become text.
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const colours = data.colours.match(/../g).map((two) => parseInt(two, 16));
  const [frames, rows, columns] = data.grid;
  const first = data.runs[0];
  const branch = Object.keys(first.maps)[0];
  const space = Object.keys(first.maps[branch])[0];
  const state = {
    run: 0, branch, space, softmax: Object.keys(first.maps[branch][space])[0], layer: "mean", step: "mean",
    concepts: first.concepts.map((_, index) => index), frame: 0, row: "", column: "", beside: "",
  };
  const SPACES = data.spaces;

  // --- Numbers

  const unpacked = new Map();
  function maps(run, space) {
    const packed = data.runs[run].maps[state.branch]?.[space]?.[state.softmax];
    if (!packed) return null;
    if (!unpacked.has(packed)) {
      const bytes = Uint8Array.from(atob(packed.values), (one) => one.charCodeAt(0));
      const levels = new DataView(bytes.buffer);
      const values = new Float32Array(bytes.length / 2);
      for (let at = 0; at < values.length; at++) {
        const level = levels.getUint16(2 * at, true);
        values[at] = level === 65535 ? NaN : packed.low + level / 65534 * (packed.high - packed.low);
      }
      unpacked.set(packed, { ...packed, values, concepts: data.runs[run].concepts.length });
    }
    return unpacked.get(packed);
  }
  // The map of one concept at a layer and a step, each a label or "mean"; null where that was not kept.
  function map(from, layer, step, concept) {
    const [l, s] = [[from.layers, layer], [from.steps, step]].map(
      ([labels, label]) => label === "mean" ? 0 : labels.indexOf(Number(label)) + 1 || -1);
    if (l < 0 || s < 0) return null;
    const patches = rows * columns;
    const at = (((l * (from.steps.length + 1) + s) * from.concepts + concept) * frames + state.frame) * patches;
    return from.values.subarray(at, at + patches);
  }
  const digits = (value) => Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "–";

  // --- Elements

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }
  function field(title, ...children) {
    return make("fieldset", {}, make("legend", { textContent: title }), ...children);
  }
  function select(name, title, options) {
    const box = make("select", { id: name });
    box.setAttribute("aria-label", title);
    for (const [value, text] of options) box.append(make("option", { value, textContent: text }));
    box.value = state[name];
    box.addEventListener("change", () => { state[name] = box.value; draw(); });
    return field(title, box);
  }
  function number(name, title, most) {
    const box = make("input", { id: name, type: "number", min: 0, max: most, value: state[name] });
    box.addEventListener("input", () => { state[name] = box.value; draw(); });
    return make("div", { className: "number" }, make("label", { htmlFor: name, textContent: `${title} (0 to ${most})` }), box);
  }
  const labels = (all, what) => [["mean", `mean of all ${what}s`], ...all.map((label) => [String(label), `${what} ${label}`])];

  function controls() {
    const aside = document.getElementById("choose");
    const found = [];
    const samples = data.runs.map((run, index) => [String(index), run.title]);
    if (samples.length > 1) found.push(select("run", "Sample", samples));
    found.push(field("Concepts", make("div", { id: "concepts", className: "checks" })));
    const spaces = Object.keys(first.maps[branch]).map((name) => [name, SPACES[name]]);
    found.push(select("space", "Space", spaces));
    const kinds = Object.keys(first.maps[branch][space]).map((kind) => [kind, data.softmax[kind]]);
    found.push(select("softmax", "Softmax over concepts", kinds));
    found.push(select("layer", "Layer", labels(data.layers, "layer")));
    found.push(select("step", "Denoising step", labels(data.steps, "step")));
    if (branch) found.push(select("branch", "Branch", Object.keys(first.maps).map((name) => [name, name])));
    if (frames > 1) {
      const slider = make("input", { id: "frame", type: "range", min: 0, max: frames - 1, value: 0 });
      slider.setAttribute("aria-label", "Frame");
      slider.addEventListener("input", () => { state.frame = Number(slider.value); draw(); });
      found.push(field("Frame", slider));
    }
    found.push(field("Patch", make("div", { className: "pair" }, number("row", "Row", rows - 1), number("column", "Column", columns - 1)),
      make("p", { className: "quiet", textContent: "Or click on the image or a map." })));
    const others = data.runs.flatMap((run, index) => Object.keys(run.maps[branch]).map(
      (name) => [`${index} ${name}`, (samples.length > 1 ? `${run.name}, ` : "") + SPACES[name]]));
    found.push(select("beside", "Compare with", [["", "nothing"], ...others]));
    const open = window.innerWidth >= 760;
    aside.replaceChildren(make("details", { open }, make("summary", { textContent: "Choose" }), ...found));
    aside.hidden = false;
  }
  let named = -1;
  function concepts() {
    if (named === state.run) return;  // the boxes stay, and with them the focus
    named = state.run;
    const names = data.runs[state.run].concepts;
    document.getElementById("concepts").replaceChildren(...names.map((name, index) => {
      const box = make("input", { type: "checkbox", checked: state.concepts.includes(index) });
      box.addEventListener("change", () => {
        state.concepts = names.map((_, at) => at).filter((at) => at === index ? box.checked : state.concepts.includes(at));
        draw();
      });
      return make("label", {}, box, name);
    }));
  }

  // --- Pictures

  const loaded = new Map();
  function picture(run) {
    const source = data.runs[run].pictures[state.frame];
    if (!source) return null;
    if (!loaded.has(source)) {
      const image = new Image();
      image.addEventListener("load", draw);
      image.src = source;
      loaded.set(source, image);
    }
    const image = loaded.get(source);
    return image.complete && image.naturalWidth ? image : null;
  }
  const colour = (share) => {
    const at = 3 * Math.round(255 * Math.min(1, Math.max(0, share)));
    return `rgb(${colours[at]} ${colours[at + 1]} ${colours[at + 2]})`;
  };
  // Values (high x wide) as filled cells; NaN stays empty.
  function cells(canvas, values, wide, [low, high], alpha) {
    const context = canvas.getContext("2d");
    const [dx, dy] = [canvas.width / wide, canvas.height / (values.length / wide)];
    context.globalAlpha = alpha;
    values.forEach((value, at) => {
      if (!Number.isFinite(value)) return;
      const [x, y] = [at % wide, Math.floor(at / wide)];
      context.fillStyle = colour((value - low) / ((high - low) || 1));
      const [left, top] = [Math.round(x * dx), Math.round(y * dy)];
      context.fillRect(left, top, Math.round((x + 1) * dx) - left, Math.round((y + 1) * dy) - top);
    });
    context.globalAlpha = 1;
  }
  function outline(canvas, x, y, wide, high) {
    const context = canvas.getContext("2d");
    const [dx, dy] = [canvas.width / wide, canvas.height / high];
    for (const [style, width] of [["#000", 5], ["#fff", 2]]) {
      Object.assign(context, { strokeStyle: style, lineWidth: width });
      context.strokeRect(x * dx, y * dy, dx, dy);
    }
  }
  // The patch or cell of a grid under the pointer.
  function under(event, canvas, wide, high) {
    const box = canvas.getBoundingClientRect();
    const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [Math.min(wide - 1, Math.floor(share[0] * wide)), Math.min(high - 1, Math.floor(share[1] * high))];
  }
  function canvas(width, height, name) {
    const found = make("canvas", { width, height });
    found.setAttribute("role", "img");
    found.setAttribute("aria-label", name);
    return found;
  }

  function masked(canvas, path) {
    const [dx, dy] = [canvas.width / data.recorded[1], canvas.height / data.recorded[0]];
    const edges = new Path2D();
    edges.addPath(new Path2D(path), new DOMMatrix([dx, 0, 0, dy, dx / 2, dy / 2]));
    const context = canvas.getContext("2d");
    for (const [style, width] of [["#000", 5], ["#fff", 2]]) {
      Object.assign(context, { strokeStyle: style, lineWidth: width });
      context.stroke(edges);
    }
  }

  function panel(run, name, values, range, path) {
    const image = picture(run);
    const tall = image ? image.naturalHeight / image.naturalWidth : rows / columns;
    const found = canvas(392, Math.round(392 * tall), values ? words(name, values) : name);
    if (image) {
      const context = found.getContext("2d");
      context.imageSmoothingEnabled = image.naturalWidth > 256;
      context.drawImage(image, 0, 0, found.width, found.height);
    }
    if (values) cells(found, values, columns, range, image ? 0.6 : 1);
    if (path) masked(found, path);
    if (chosen()) outline(found, Number(state.column), Number(state.row), columns, rows);
    found.addEventListener("click", (event) => {
      [state.column, state.row] = under(event, found, columns, rows);
      for (const id of ["row", "column"]) document.getElementById(id).value = state[id];
      draw();
    });
    found.addEventListener("mousemove", (event) => {
      const [x, y] = under(event, found, columns, rows);
      found.title = values ? `row ${y}, column ${x}: ${digits(values[y * columns + x])}` : `row ${y}, column ${x}`;
    });
    return make("figure", {}, make("figcaption", { textContent: name }), found);
  }
  function words(name, values) {
    const finite = [...values].filter(Number.isFinite);
    const top = values.indexOf(Math.max(...finite));
    return `Map of ${name}: ${digits(Math.min(...finite))} to ${digits(Math.max(...finite))}, highest in row ` +
      `${Math.floor(top / columns)}, column ${top % columns}`;
  }
  const chosen = () => [["row", rows], ["column", columns]].every(
    ([name, most]) => state[name] !== "" && Number(state[name]) >= 0 && Number(state[name]) < most);

  function course(from, concept, name, range) {
    const [layers, steps] = [from.layers, from.steps];
    const at = Number(state.row) * columns + Number(state.column);
    const values = steps.flatMap((step) => layers.map((layer) => map(from, layer, step, concept)[at]));
    const found = canvas(layers.length * 24, steps.length * 18, `${name} at the patch by layer, across, and step, down`);
    cells(found, values, layers.length, range, 1);
    const [l, s] = [layers.indexOf(Number(state.layer)), steps.indexOf(Number(state.step))];
    if (l >= 0 && s >= 0) outline(found, l, s, layers.length, steps.length);
    found.addEventListener("click", (event) => {
      const [x, y] = under(event, found, layers.length, steps.length);
      [state.layer, state.step] = [String(layers[x]), String(steps[y])];
      for (const id of ["layer", "step"]) document.getElementById(id).value = state[id];
      draw();
    });
    found.addEventListener("mousemove", (event) => {
      const [x, y] = under(event, found, layers.length, steps.length);
      found.title = `layer ${layers[x]}, step ${steps[y]}: ${digits(values[y * layers.length + x])}`;
    });
    return make("figure", {}, make("figcaption", { textContent: name }), found);
  }
  function scale([low, high]) {
    const bar = canvas(256, 1, "colour scale");
    cells(bar, Float32Array.from({ length: 256 }, (_, at) => at), 256, [0, 255], 1);
    return make("div", { className: "scale" }, digits(low), bar, digits(high));
  }
  function table(names, found, measured) {
    const at = Number(state.row) * columns + Number(state.column);
    const heads = ["Concept", ...(chosen() ? ["At the patch"] : []), "Lowest", "Highest", ...measured.map(([name]) => name)];
    const body = found.map((values, index) => {
      const finite = [...values].filter(Number.isFinite);
      const row = [...(chosen() ? [values[at]] : []), Math.min(...finite), Math.max(...finite),
        ...measured.map(([, numbers]) => numbers[index] ?? NaN)];
      return make("tr", {}, make("th", { scope: "row", textContent: names[index] }),
        ...row.map((value) => make("td", { textContent: digits(value) })));
    });
    const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col", textContent: text })));
    const scrolled = make("div", { className: "scrolled" },
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
    scrolled.tabIndex = 0;
    scrolled.setAttribute("role", "group");
    scrolled.setAttribute("aria-label", "Numbers");
    return scrolled;
  }

  function section(run, space, names) {
    const about = data.runs[run];
    const parts = [make("h2", { textContent: about.title }), make("p", { className: "quiet", textContent: SPACES[space] })];
    const from = maps(run, space);
    const shown = about.concepts.map((_, index) => index).filter((index) => names.includes(about.concepts[index]));
    const found = from ? shown.map((concept) => map(from, state.layer, state.step, concept)) : [null];
    if (found.some((values) => !values) || !found.length) {
      const why = found.length ? "Nothing was kept of this layer and step in this space." : "No concept is chosen.";
      return make("section", {}, ...parts, make("p", { textContent: why }));
    }
    const finite = found.flatMap((values) => [...values]).filter(Number.isFinite);
    const range = [Math.min(...finite), Math.max(...finite)];
    const titles = shown.map((index) => about.concepts[index]);
    const paths = about.outlines[state.frame] ?? [];
    const panels = found.map((values, index) => panel(run, titles[index], values, range, paths[shown[index]]));
    const means = state.layer === "mean" && state.step === "mean";
    const measured = Object.entries(means ? from.metrics[state.frame] : {}).map(
      ([name, numbers]) => [data.metrics[name], shown.map((concept) => numbers[concept])]);
    if (picture(run)) panels.unshift(panel(run, frames > 1 ? "video" : "image", null, range));
    parts.push(make("div", { className: "maps" }, ...panels), scale(range), table(titles, found, measured));
    if (chosen()) {
      const at = Number(state.row) * columns + Number(state.column);
      const all = shown.flatMap((concept) => from.layers.flatMap(
        (layer) => from.steps.map((step) => map(from, layer, step, concept)[at]))).filter(Number.isFinite);
      const ends = [Math.min(...all), Math.max(...all)];
      parts.push(make("h3", { textContent: `Row ${state.row}, column ${state.column}, by layer and step` }),
        make("p", { className: "quiet", textContent: `Layers ${from.layers.join(", ")} across, steps ${from.steps.join(", ")} down.` }),
        make("div", { className: "maps courses" }, ...shown.map((concept, index) => course(from, concept, titles[index], ends))),
        scale(ends));
    }
    return make("section", {}, ...parts);
  }
  function draw() {
    state.run = Number(state.run);
    concepts();
    const names = state.concepts.map((index) => data.runs[state.run].concepts[index]);
    const sections = [section(state.run, state.space, names)];
    if (state.beside) {
      const at = state.beside.indexOf(" ");
      sections.push(section(Number(state.beside.slice(0, at)), state.beside.slice(at + 1), names));
    }
    document.getElementById("live").replaceChildren(...sections);
  }

  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const dark = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const root = document.documentElement;
    root.dataset.theme = (root.dataset.theme || dark) === "dark" ? "light" : "dark";
  });
  theme.hidden = false;
  document.getElementById("still").hidden = true;
  document.getElementById("live").hidden = false;
  controls();
  draw();
})();
