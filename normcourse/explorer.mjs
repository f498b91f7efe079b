// The explorer: which entries of a batch share a mean and a deviation with the one you click.
// An anywidget in Jupyter and Colab; on a page: import explorer from "./explorer.mjs", then
// explorer.render({ el: an element }).

const NORMS = {
  bn: { name: "Batch Norm", color: "#0072B2", axes: "N, H, W" },
  ln: { name: "Layer Norm", color: "#E69F00", axes: "C, H, W" },
  in: { name: "Instance Norm", color: "#009E73", axes: "H, W" },
  gn: { name: "Group Norm", color: "#D55E00", axes: "C/G, H, W" },
};
const WORDS = {
  bn: "One mean for each channel, shared by all images of the batch.",
  ln: "One mean for each image, shared by all of its channels.",
  in: "One mean for each channel of each image.",
  gn: "One mean for each group of channels of each image.",
};
const SIZES = { N: [3, 1, 4], C: [6, 1, 8], H: [2, 1, 3], W: [2, 1, 3] }; // start, least, most
const EPS = 1e-5;
const STYLE = `
.explorer { font: 15px/1.5 system-ui, sans-serif; color: inherit; max-width: 62rem; }
.explorer fieldset { border: 0; margin: 0 0 .5rem; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; }
.explorer legend { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
.explorer label { display: inline-flex; align-items: center; gap: .4rem; }
.explorer input { margin: 0; }
.explorer input[type=range] { width: 130px; }
.explorer .flat { display: grid; gap: 6px; width: max-content; margin: .5rem 0; }
.explorer .map { display: grid; gap: 1px; }
.explorer .flat button { width: 26px; height: 26px; padding: 0; font: inherit; font-size: 13px; color: inherit;
  background: none; border: 1px solid color-mix(in srgb, currentColor 35%, transparent); border-radius: 2px; cursor: pointer; }
.explorer .flat button.inside { background: color-mix(in srgb, var(--norm) 55%, transparent); }
.explorer .flat button[aria-pressed=true] { outline: 3px solid currentColor; outline-offset: -2px; font-weight: 700; }
.explorer .views { display: flex; flex-wrap: wrap; align-items: center; gap: 1rem 2.5rem; }
.explorer .scroll { overflow-x: auto; max-width: 100%; }
.explorer svg { max-width: 100%; height: auto; }
.explorer polygon { stroke: currentColor; stroke-width: .035; fill: none; }
.explorer polygon.inside { fill: var(--norm); fill-opacity: .55; }
.explorer text { fill: currentColor; font-size: .6px; text-anchor: middle; }
.explorer [aria-live] { min-height: 4.5em; margin: .3rem 0; }`;

export function value(n, c, h, w, { C, H, W }) {
  return ((((n * C + c) * H + h) * W + w) * 7) % 10;
}

// Whether the entry b is in the set S_i of the entry a (Wu & He 2018, equation 2).
export function shares(norm, a, b, { C, G }) {
  const image = a[0] === b[0];
  if (norm === "bn") return a[1] === b[1];
  if (norm === "ln") return image;
  if (norm === "in") return image && a[1] === b[1];
  return image && Math.floor((a[1] * G) / C) === Math.floor((b[1] * G) / C);
}

export function entries({ N, C, H, W }) {
  const all = [];
  for (let n = 0; n < N; n++)
    for (let c = 0; c < C; c++)
      for (let h = 0; h < H; h++) for (let w = 0; w < W; w++) all.push([n, c, h, w]);
  return all;
}

// Size of the set, mean, deviation, and what becomes of the entry.
export function statistics({ norm, at, ...size }) {
  const set = entries(size).filter((entry) => shares(norm, at, entry, size));
  const values = set.map((entry) => value(...entry, size));
  const mean = values.reduce((sum, x) => sum + x, 0) / values.length;
  const variance = values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / values.length;
  const result = (value(...at, size) - mean) / Math.sqrt(variance + EPS);
  return { count: set.length, mean, deviation: Math.sqrt(variance), result };
}

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "polygon", "text"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
  made.append(...children);
  return made;
}

function divisors(C) {
  return Array.from({ length: C }, (_, k) => k + 1).filter((g) => C % g === 0);
}

// The three visible faces of the batch: C to the right, (H, W) upwards, N into the page.
function drawCube(state) {
  const { norm, at, N, C, H, W } = state;
  const S = H * W;
  const point = (c, s, n) => `${c + 0.5 * n},${-s - 0.42 * n}`;
  const [width, height] = [C + N / 2 + 2.6, S + 0.42 * N + 1.4];
  const cube = element("svg", { viewBox: `-1.6 ${-S - 0.42 * N - 0.3} ${width} ${height}`, role: "img" });
  cube.style.width = `${27 * width}px`; // one size of cells, whatever the batch
  cube.setAttribute("aria-label", `The batch as a cube; coloured is what shares the mean in ${NORMS[norm].name}`);
  const face = (corners, n, c, s) => {
    const inside = shares(norm, at, [n, c, Math.floor(s / W), s % W], state);
    cube.append(element("polygon", { points: corners.map((x) => point(...x)).join(" "), class: inside ? "inside" : "" }));
  };
  for (let c = 0; c < C; c++) {
    for (let s = 0; s < S; s++) face([[c, s, 0], [c + 1, s, 0], [c + 1, s + 1, 0], [c, s + 1, 0]], 0, c, s);
    for (let n = 0; n < N; n++) face([[c, S, n], [c + 1, S, n], [c + 1, S, n + 1], [c, S, n + 1]], n, c, S - 1);
  }
  for (let n = 0; n < N; n++)
    for (let s = 0; s < S; s++) face([[C, s, n], [C, s + 1, n], [C, s + 1, n + 1], [C, s, n + 1]], n, C - 1, s);
  cube.append(element("text", { x: C / 2, y: 0.8 }, "C"), element("text", { x: -0.9, y: -S / 2 }, "H, W"));
  cube.append(element("text", { x: C + N / 4 + 0.6, y: -0.21 * N + 0.4 }, "N"));
  return cube;
}

function render({ el }) {
  const state = { norm: "bn", at: [0, 0, 0, 0], G: 2 };
  for (const [letter, [start]] of Object.entries(SIZES)) state[letter] = start;
  const norms = element("fieldset", {}, element("legend", {}, "Norm"));
  const sizes = element("fieldset", {}, element("legend", {}, "Size of the batch"));
  const views = element("div", { class: "views" });
  const words = element("p", { "aria-live": "polite" });
  const group = `norm-${Math.random().toString(36).slice(2)}`;
  for (const [key, { name }] of Object.entries(NORMS)) {
    const radio = element("input", { type: "radio", name: group, value: key });
    radio.checked = key === state.norm;
    radio.onchange = () => update({ norm: key });
    norms.append(element("label", {}, radio, name));
  }
  for (const [letter, [start, least, most]] of Object.entries(SIZES)) {
    const slider = element("input", { type: "range", min: least, max: most, value: start });
    const shown = element("output", {}, start);
    slider.oninput = () => update({ [letter]: Number((shown.value = slider.value)) });
    sizes.append(element("label", {}, letter, slider, shown));
  }
  const groups = element("select");
  groups.onchange = () => update({ G: Number(groups.value) });
  sizes.append(element("label", { title: "used by Group Norm alone" }, "G", groups));

  function update(change) {
    Object.assign(state, change);
    const { norm, N, C, H, W } = state;
    const limits = [N, C, H, W];
    state.at = state.at.map((k, axis) => Math.min(k, limits[axis] - 1));
    if (C % state.G) state.G = Math.max(...divisors(C).filter((g) => g < state.G));
    groups.replaceChildren(...divisors(C).map((g) => element("option", {}, g)));
    groups.value = state.G;
    groups.disabled = norm !== "gn";
    el.style.setProperty("--norm", NORMS[norm].color);
    const focused = views.contains(document.activeElement);
    views.replaceChildren(drawCube(state), element("div", { class: "scroll" }, drawFlat()));
    if (focused) views.querySelector("[aria-pressed=true]").focus();
    tell();
  }

  function drawFlat() {
    const { norm, at, N, C, H, W } = state;
    const flat = element("div", { class: "flat", role: "group", "aria-label": "entries: images down, channels across" });
    flat.style.gridTemplateColumns = `repeat(${C}, max-content)`;
    for (let k = 0; k < N * C; k++) {
      const map = element("div", { class: "map" });
      map.style.gridTemplateColumns = `repeat(${W}, max-content)`;
      flat.append(map);
    }
    for (const [n, c, h, w] of entries(state)) {
      const inside = shares(norm, at, [n, c, h, w], state);
      const chosen = [n, c, h, w].every((k, axis) => k === at[axis]);
      const label = `n ${n}, c ${c}, h ${h}, w ${w}: ${value(n, c, h, w, state)}${inside ? ", shares the mean" : ""}`;
      const button = element("button", { type: "button", "aria-label": label, "aria-pressed": chosen, tabindex: chosen ? 0 : -1 });
      button.className = inside ? "inside" : "";
      button.append(value(n, c, h, w, state));
      button.onclick = () => update({ at: [n, c, h, w] });
      flat.children[n * C + c].append(button);
    }
    flat.onkeydown = move;
    return flat;
  }

  // The arrow keys walk over the sheet: images and rows down, channels and columns across.
  function move(event) {
    const { at: [n, c, h, w], N, C, H, W } = state;
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const across = Math.min(Math.max(c * W + w + step[0], 0), C * W - 1);
    const down = Math.min(Math.max(n * H + h + step[1], 0), N * H - 1);
    update({ at: [Math.floor(down / H), Math.floor(across / W), down % H, across % W] });
  }

  function tell() {
    const { count, mean, deviation, result } = statistics(state);
    const { name, axes } = NORMS[state.norm];
    const x = value(...state.at, state);
    words.replaceChildren(
      element("strong", {}, name), ` averages over ${axes}. ${WORDS[state.norm]} `, element("br"),
      `${count} ${count === 1 ? "entry shares" : "entries share"} μ = ${mean.toFixed(2)} and σ = ${deviation.toFixed(2)}; `,
      `the chosen ${x} becomes ${result.toFixed(2)}.`,
    );
    Object.assign(el.dataset, { count, mean, deviation, result });
  }

  el.classList.add("explorer");
  el.replaceChildren(element("style", {}, STYLE), norms, sizes, views, words);
  update({});
}

export default { render };
