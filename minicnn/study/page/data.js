// What the page carries: JSON in <script> elements, read when it is wanted; numbers in base64. And small helpers for all.

const known = new Map();

/** The JSON of the <script> element of this id, or null. */
function read(id) {
  if (!known.has(id)) {
    const element = document.getElementById(id);
    known.set(id, element ? JSON.parse(element.textContent) : null);
  }
  return known.get(id);
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** {shape, floats} -> {shape, at(i, j, ...)}: numbers that can be looked up; null stays null. */
function numbers(packed) {
  if (!packed) return null;
  if (!packed.array) {
    // decoded once
    const bytes = bytesOf(packed.floats),
      view = new DataView(bytes.buffer);
    packed.array = Float32Array.from({length: bytes.length / 4}, (_, i) => view.getFloat32(4 * i, true));
  }
  const {shape, array} = packed;
  const at = (...index) => array[index.reduce((where, n, axis) => where * shape[axis] + n, 0)];
  return {shape, at};
}

/** A number in a few digits. */
function few(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "no number";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? x.toExponential(digits - 1).replace("+", "") : Number(x.toPrecision(digits)).toString();
  return text.replaceAll("-", "\u2212");
}

const count = n => n.toLocaleString("en").replaceAll(",", "\u202f");
const by = shape => (shape.length ? shape.join(" \u00d7 ") : "one number");

function inBytes(n) {
  if (n < 1000) return `${n} bytes`;
  return n < 1e6 ? `${few(n / 1e3, 3)} kB` : `${few(n / 1e6, 3)} MB`;
}

function inTime(ms) {
  return ms === null ? "none" : ms < 1 ? `${few(1e3 * ms, 3)} \u00b5s` : `${few(ms, 3)} ms`;
}

/** An element with attributes and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return element;
}

function drawn(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A <select> that calls back with the chosen index. */
function choice(label, names, chosen, then) {
  const select = make(
    "select",
    {onchange: () => then(select.selectedIndex)},
    names.map(name => make("option", {}, String(name))),
  );
  select.selectedIndex = chosen;
  return make("label", {}, `${label} `, select);
}

/** Buttons of which one is pressed. */
function tabs(names, chosen, then) {
  const buttons = names.map((name, i) =>
    make(
      "button",
      {
        type: "button",
        "aria-pressed": String(i === chosen),
        onclick: () => {
          buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
          then(i);
        },
      },
      name,
    ),
  );
  return make("div", {class: "controls", role: "group"}, buttons);
}

function table(head, rows, numeric = []) {
  const cells = (tag, row) => row.map((cell, i) => make(tag, numeric.includes(i) ? {class: "number"} : {}, cell));
  return make(
    "div",
    {class: "scroll"},
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, cells("th", head))),
      make(
        "tbody",
        {},
        rows.map(row => make("tr", {}, cells("td", row))),
      ),
    ),
  );
}

// What the terms of an explorer come to, beside the number that the engine wrote; both are kept on the explorer's node.
function concluded(node, terms, sum, engine) {
  node.dataset.sum = sum;
  node.dataset.engine = engine;
  return make("p", {class: "sum"}, `${terms} = `, make("strong", {}, few(sum, 6)), `; the engine wrote ${few(engine, 6)}`);
}
