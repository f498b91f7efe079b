// The explorer: which entries of a batch share a mean and a deviation with the one you click.
// An anywidget in Jupyter and Colab; on a page: import explorer from "./explorer.mjs", then
// explorer.render({ el: an element }).

const NORMS = {
  bn: { name: "Batch Norm", color: "#0072B2", axes: "N, H, W", words: "each channel, shared by all images of the batch" },
  ln: { name: "Layer Norm", color: "#E69F00", axes: "C, H, W", words: "each image, shared by all of its channels" },
  in: { name: "Instance Norm", color: "#009E73", axes: "H, W", words: "each channel of each image" },
  gn: { name: "Group Norm", color: "#D55E00", axes: "C/G, H, W", words: "each group of channels of each image" },
};
const SIZES = { N: ["images", 3, 1, 4], C: ["channels", 6, 1, 8], H: ["height", 2, 1, 3], W: ["width", 2, 1, 3] }; // start, least, most
const STEPS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
const STYLE = `
.explorer { font: 15px/1.5 system-ui, sans-serif; color: inherit; max-width: 62rem; }
.explorer fieldset { border: 0; margin: 0 0 .5rem; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; }
.explorer label { display: inline-flex; align-items: center; gap: .4rem; margin: 0; }
.explorer input { margin: 0; }
.explorer input[type=range] { width: 130px; }
.explorer .views { display: flex; flex-wrap: wrap; align-items: center; gap: 1rem 2.5rem; }
.explorer .flat { display: grid; gap: 6px; max-width: 100%; overflow-x: auto; padding: 2px; }
.explorer .map { display: grid; gap: 1px; }
.explorer button { width: 26px; height: 26px; padding: 0; font: inherit; font-size: 13px; color: inherit; cursor: pointer;
  background: none; border: 1px solid color-mix(in srgb, currentColor 35%, transparent); border-radius: 2px; }
.explorer button.inside { background: color-mix(in srgb, var(--norm) 55%, transparent); }
.explorer button[aria-pressed=true] { outline: 3px solid currentColor; outline-offset: -2px; font-weight: 700; }
.explorer svg { max-width: 100%; height: auto; }
.explorer polygon { stroke: currentColor; stroke-width: .035; fill: none; }
.explorer polygon.inside { fill: var(--norm); fill-opacity: .55; }
.explorer text { fill: currentColor; font-size: .6px; text-anchor: middle; }
.explorer [aria-live] { min-height: 4.5em; margin: .3rem 0; }`;

function value(n, c, h, w, { C, H, W }) {
  return ((((n * C + c) * H + h) * W + w) * 7) % 10;
}

// Whether the entry b is in the set S_i of the entry a (Wu & He 2018, equation 2).
function shares(norm, a, b, { C, G }) {
  const group = (c) => Math.floor((c * G) / C);
  if (norm === "bn") return a[1] === b[1];
  if (norm === "ln") return a[0] === b[0];
  if (norm === "in") return a[0] === b[0] && a[1] === b[1];
  return a[0] === b[0] && group(a[1]) === group(b[1]);
}

function entries({ N, C, H, W }) {
  const index = (i) => [Math.floor(i / (C * H * W)), Math.floor(i / (H * W)) % C, Math.floor(i / W) % H, i % W];
  return Array.from({ length: N * C * H * W }, (_, i) => index(i));
}

// Size of the set, mean, deviation, and what becomes of the entry.
function statistics(state) {
  const values = entries(state).filter((entry) => shares(state.norm, state.at, entry, state)).map((entry) => value(...entry, state));
  const average = (numbers) => numbers.reduce((sum, x) => sum + x, 0) / numbers.length;
  const mean = average(values);
  const variance = average(values.map((x) => (x - mean) ** 2));
  const result = (value(...state.at, state) - mean) / Math.sqrt(variance + 1e-5);
  return { count: values.length, mean, deviation: Math.sqrt(variance), result };
}

function element(tag, attributes = {}, ...children) {
  const space = ["svg", "polygon", "text"].includes(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const made = document.createElementNS(space, tag);
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  made.append(...children);
  return made;
}

// The three visible faces of the batch: C to the right, (H, W) upwards, N into the page.
function drawCube(state) {
  const { norm, at, N, C, H, W } = state;
  const [S, depth] = [H * W, 0.42 * N];
  const [width, height] = [C + N / 2 + 2.6, S + depth + 1.4];
  const name = `The batch as a cube; coloured is what shares the mean in ${NORMS[norm].name}`;
  const cube = element("svg", { viewBox: `-1.6 ${-S - depth - 0.3} ${width} ${height}`, role: "img", "aria-label": name });
  cube.style.width = `${27 * width}px`; // one size of cells, whatever the batch
  const face = (n, c, s, corners) => {
    const points = corners.map(([x, y, z]) => `${x + 0.5 * z},${-y - 0.42 * z}`).join(" ");
    const inside = shares(norm, at, [n, c, Math.floor(s / W), s % W], state);
    cube.append(element("polygon", { points, class: inside ? "inside" : "" }));
  };
  for (const [n, c, h, w] of entries(state)) {
    const s = h * W + w;
    if (n === 0) face(n, c, s, [[c, s, 0], [c + 1, s, 0], [c + 1, s + 1, 0], [c, s + 1, 0]]);
    if (s === S - 1) face(n, c, s, [[c, S, n], [c + 1, S, n], [c + 1, S, n + 1], [c, S, n + 1]]);
    if (c === C - 1) face(n, c, s, [[C, s, n], [C, s + 1, n], [C, s + 1, n + 1], [C, s, n + 1]]);
  }
  const letters = { C: [C / 2, 0.8], "H, W": [-0.9, -S / 2], N: [C + N / 4 + 0.6, 0.4 - depth / 2] };
  for (const [letter, [x, y]] of Object.entries(letters)) cube.append(element("text", { x, y }, letter));
  return cube;
}

// The batch laid flat: images down, channels across; each entry is a button.
function drawFlat(state, choose) {
  const { norm, at, N, C, W } = state;
  const flat = element("div", { class: "flat", role: "group", "aria-label": "entries: images down, channels across" });
  flat.style.gridTemplateColumns = `repeat(${C}, max-content)`;
  for (let k = 0; k < N * C; k++) flat.append(element("div", { class: "map", style: `grid-template-columns: repeat(${W}, 26px)` }));
  for (const entry of entries(state)) {
    const [n, c, h, w] = entry;
    const [inside, chosen] = [shares(norm, at, entry, state), String(entry) === String(at)];
    const name = `n ${n}, c ${c}, h ${h}, w ${w}: ${value(...entry, state)}${inside ? ", shares the mean" : ""}`;
    const button = element("button", { type: "button", "aria-label": name, "aria-pressed": chosen, tabindex: chosen ? 0 : -1 });
    button.className = inside ? "inside" : "";
    button.append(value(...entry, state));
    button.onclick = () => choose(entry);
    flat.children[n * C + c].append(button);
  }
  return flat;
}

// The entry one step further on the sheet, across or down.
function walk({ at: [n, c, h, w], N, C, H, W }, [across, down]) {
  const x = Math.min(Math.max(c * W + w + across, 0), C * W - 1);
  const y = Math.min(Math.max(n * H + h + down, 0), N * H - 1);
  return [Math.floor(y / H), Math.floor(x / W), y % H, x % W];
}

function render({ el }) {
  const state = { norm: "bn", at: [0, 0, 0, 0], G: 2 };
  const norms = element("fieldset", { "aria-label": "Norm" });
  const sizes = element("fieldset", { "aria-label": "Size of the batch" });
  const groups = element("select", { "aria-label": "G, groups" });
  const views = element("div", { class: "views" });
  const words = element("p", { "aria-live": "polite" });
  const group = `norm-${Math.random().toString(36).slice(2)}`;
  for (const [key, { name }] of Object.entries(NORMS)) {
    const radio = element("input", { type: "radio", name: group, value: key });
    radio.checked = key === state.norm;
    radio.onchange = () => update({ norm: key });
    norms.append(element("label", {}, radio, name));
  }
  for (const [letter, [what, value, min, max]] of Object.entries(SIZES)) {
    const slider = element("input", { type: "range", min, max, value, "aria-label": `${letter}, ${what}` });
    const shown = element("output", {}, value);
    state[letter] = value;
    slider.oninput = () => update({ [letter]: Number((shown.value = slider.value)) });
    sizes.append(element("label", { title: what }, letter, slider, shown));
  }
  groups.onchange = () => update({ G: Number(groups.value) });
  sizes.append(element("label", { title: "groups, used by Group Norm alone" }, "G", groups));

  function update(change) {
    Object.assign(state, change);
    const { norm, N, C, H, W } = state;
    const divisors = Array.from({ length: C }, (_, k) => k + 1).filter((g) => C % g === 0);
    state.at = state.at.map((k, axis) => Math.min(k, [N, C, H, W][axis] - 1));
    state.G = Math.max(...divisors.filter((g) => g <= state.G));
    groups.replaceChildren(...divisors.map((g) => element("option", {}, g)));
    groups.value = state.G;
    groups.disabled = norm !== "gn";
    el.style.setProperty("--norm", NORMS[norm].color);
    const focused = views.contains(document.activeElement);
    views.replaceChildren(drawCube(state), drawFlat(state, (at) => update({ at })));
    if (focused) views.querySelector("[aria-pressed=true]").focus();
    tell();
  }

  function tell() {
    const { count, mean, deviation, result } = statistics(state);
    const { name, axes, words: which } = NORMS[state.norm];
    const numbers = `μ = ${mean.toFixed(2)} and σ = ${deviation.toFixed(2)}`;
    words.replaceChildren(element("strong", {}, name), ` averages over ${axes}: one mean for ${which}.`, element("br"));
    words.append(`${count} ${count === 1 ? "entry shares" : "entries share"} ${numbers}; `);
    words.append(`the chosen ${value(...state.at, state)} becomes ${result.toFixed(2)}.`);
    Object.assign(el.dataset, { at: state.at, count, mean, deviation, result });
  }

  views.onkeydown = (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    update({ at: walk(state, STEPS[event.key]) });
  };
  el.classList.add("explorer");
  el.replaceChildren(element("style", {}, STYLE), norms, sizes, views, words);
  update({});
}

export default { render };
