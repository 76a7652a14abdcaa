// Numbers as colours: one scale from blue over the page's own ground to red for either sign, one up to orange for the others.

const dark = matchMedia("(prefers-color-scheme: dark)");

const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));

/** The colour [r, g, b] of x on a scale from low to high. */
function colour(x, low, high) {
  const ground = dark.matches ? [24, 28, 34] : [250, 250, 250];
  if (!Number.isFinite(x)) return dark.matches ? [70, 70, 70] : [205, 205, 205];
  const t = Math.max(-1, Math.min(1, x / (Math.max(Math.abs(low), Math.abs(high)) || 1)));
  const strong = Math.pow(Math.abs(t), 0.75); // small numbers are to be seen, too
  if (low < 0)
    return mix(
      ground,
      t < 0 ? (dark.matches ? [88, 166, 255] : [20, 80, 175]) : dark.matches ? [255, 115, 90] : [185, 25, 30],
      strong,
    );
  return strong < 0.5
    ? mix(ground, [236, 140, 30], 2 * strong)
    : mix([236, 140, 30], dark.matches ? [255, 240, 200] : [90, 25, 10], 2 * strong - 1);
}

function paint(canvas, rows, columns, value, low, high) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"),
    image = context.createImageData(columns, rows);
  for (let r = 0, i = 0; r < rows; r++)
    for (let c = 0; c < columns; c++, i += 4) {
      [image.data[i], image.data[i + 1], image.data[i + 2]] = colour(value(r, c), low, high);
      image.data[i + 3] = 255;
    }
  context.putImageData(image, 0, 0);
}

/** A bar of the colours with the numbers at its ends. */
function scale(low, high) {
  const canvas = make("canvas", {"aria-hidden": "true", style: "width:8rem;height:.7rem"});
  paint(canvas, 1, 128, (_, c) => low + ((high - low) * c) / 127, low, high);
  return make("div", {class: "scale"}, few(low, 3), canvas, few(high, 3));
}

/** Planes side by side on one scale, as pictures.py packs them; what lies under the pointer is said below. */
function planes(picture, title) {
  const [n, rows, columns] = picture.shape,
    levels = (picture.decoded ??= bytesOf(picture.pixels));
  const value = (i, r, c) => picture.low + ((picture.high - picture.low) * levels[(i * rows + r) * columns + c]) / 254;
  const target = n === 1 ? 440 : Math.max(rows, columns) > 26 ? 84 : 52;
  const wide = Math.max(1, Math.min(n > 1 ? 12 : 26, Math.floor(target / Math.max(rows, columns))));
  const caption = make("figcaption", {}, title);
  const where = make("span");
  caption.append(where);
  const shown = picture.names.map((name, i) => {
    const canvas = make("canvas", {
      role: "img",
      "aria-label": `${title}${name === "" ? "" : `, ${name}`}: ${rows} by ${columns} numbers`,
      style: `width:${wide * columns}px;${wide * columns > 300 ? "" : `height:${wide * rows}px`}`,
    });
    paint(canvas, rows, columns, (r, c) => value(i, r, c), picture.low, picture.high);
    canvas.addEventListener("pointermove", event => {
      const box = canvas.getBoundingClientRect();
      const r = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
      const c = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
      where.textContent = ` \u2014 ${name === "" ? "" : `${name} `}at ${r}, ${c}: about ${few(value(i, r, c), 3)}`;
    });
    canvas.addEventListener("pointerleave", () => {
      where.textContent = "";
    });
    return make("div", {class: "plane"}, canvas, name);
  });
  const shrunk = picture.block > 1 ? make("span", {}, `each pixel the mean of ${picture.block} \u00d7 ${picture.block}`) : null;
  const bar = scale(picture.low, picture.high);
  if (shrunk) bar.append(shrunk);
  return make("figure", {}, caption, make("div", {class: "planes"}, shown), bar);
}

/** How the numbers are spread. */
function histogram(data, back = false) {
  if (data.count === 1 && data.finite) return make("p", {class: "number"}, few(data.mean, 7));
  if (!data.finite) return make("p", {class: "bad"}, `none of the ${count(data.count)} numbers is finite`);
  const width = 260,
    height = 64,
    top = Math.max(...data.bins),
    step = width / data.bins.length;
  const svg = drawn("svg", {
    viewBox: `0 0 ${width} ${height + 16}`,
    width,
    height: height + 16,
    class: `histogram${back ? " back" : ""}`,
    role: "img",
    "aria-label": `histogram from ${few(data.low)} to ${few(data.high)}`,
  });
  data.bins.forEach((n, i) => {
    const h = n && Math.max(1.5, (height * n) / top); // what is rare is still to be seen
    svg.append(drawn("rect", {x: i * step, y: height - h, width: step - 0.8, height: h}));
  });
  const at = x => ((x - data.low) / (data.high - data.low || 1)) * width;
  if (data.low < 0 && data.high > 0) {
    svg.append(drawn("line", {x1: at(0), x2: at(0), y1: 0, y2: height}));
    if (at(0) > 46 && at(0) < width - 46) svg.append(drawn("text", {x: at(0), y: height + 13, "text-anchor": "middle"}, "0"));
  }
  svg.append(
    drawn("text", {x: 0, y: height + 13}, few(data.low, 3)),
    drawn("text", {x: width, y: height + 13, "text-anchor": "end"}, few(data.high, 3)),
  );
  const broken = data.count > data.finite ? `, ${count(data.count - data.finite)} not finite` : "";
  return make(
    "figure",
    {},
    svg,
    make(
      "figcaption",
      {},
      `${count(data.count)} numbers: mean ${few(data.mean, 3)}, standard deviation ${few(data.std, 3)}, ` +
        `norm ${few(data.norm, 3)}, ${few(100 * data.zeros, 3)} % zeros${broken}`,
    ),
  );
}

/**
 * A plane of exact numbers of which one can be chosen, by pointer or by arrow keys.
 * top, left: where it lies in the whole image.   value(r, c), usable(r, c): by place in the plane.
 * end: of the scale, to either side; by default as far as its numbers go.
 */
function grid({title, rows, columns, top = 0, left = 0, value, usable = () => true, pick = null, end = null}) {
  const cell = Math.max(4, Math.min(24, Math.floor(250 / Math.max(rows, columns))));
  const canvas = make("canvas", {width: columns * cell, height: rows * cell, "data-rows": rows, "data-columns": columns});
  let high = 0,
    low = 0,
    marks = [];
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) {
      const x = value(r, c);
      if (Number.isFinite(x)) {
        high = Math.max(high, Math.abs(x));
        if (x < 0) low = -1;
      }
    }
  high = end ?? high;
  low = low < 0 || end !== null ? -high : 0;
  const node = make("div", {class: pick ? "grid" : "grid still"}, make("p", {}, title), canvas, scale(low, high));
  const chosen = {r: rows >> 1, c: columns >> 1};

  function draw() {
    const context = canvas.getContext("2d");
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) {
        const [red, green, blue] = colour(value(r, c), low, high);
        context.fillStyle = `rgb(${red} ${green} ${blue})`;
        context.fillRect(c * cell, r * cell, cell, cell);
        if (!usable(r, c)) {
          // crossed out
          context.strokeStyle = dark.matches ? "#555c66" : "#b9bfc8";
          context.lineWidth = 1;
          context.beginPath();
          context.moveTo(c * cell, (r + 1) * cell);
          context.lineTo((c + 1) * cell, r * cell);
          context.stroke();
        }
      }
    for (const {r, c, h = 1, w = 1, kind = "window"} of marks) {
      context.strokeStyle = kind === "won" ? (dark.matches ? "#f0a070" : "#a63c06") : dark.matches ? "#ffffff" : "#000000";
      context.lineWidth = 2.5;
      context.strokeRect(c * cell + 1.2, r * cell + 1.2, w * cell - 2.4, h * cell - 2.4);
    }
  }
  function choose(r, c) {
    if (r < 0 || c < 0 || r >= rows || c >= columns || !usable(r, c)) return;
    Object.assign(chosen, {r, c});
    canvas.setAttribute("aria-label", `${title}; chosen: row ${top + r}, column ${left + c}, ${few(value(r, c))}`);
    pick(r, c);
  }
  if (pick) {
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${title}; arrow keys choose a number`);
    const under = event => {
      const box = canvas.getBoundingClientRect();
      choose(
        Math.floor(((event.clientY - box.top) / box.height) * rows),
        Math.floor(((event.clientX - box.left) / box.width) * columns),
      );
    };
    canvas.addEventListener("pointermove", event => {
      if (event.pointerType === "mouse") under(event);
    });
    canvas.addEventListener("click", under);
    canvas.addEventListener("keydown", event => {
      const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!move) return;
      event.preventDefault();
      event.stopPropagation(); // the page's own arrow keys go from step to step
      choose(chosen.r + move[0], chosen.c + move[1]);
    });
  } else {
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title);
  }
  draw();
  return {
    node,
    choose,
    mark(...list) {
      marks = list;
      draw();
    },
    /** The first usable place, the middle if it is one. */
    start() {
      if (usable(chosen.r, chosen.c)) return choose(chosen.r, chosen.c);
      for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) if (usable(r, c)) return choose(r, c);
    },
  };
}

/** A long row of numbers as one thin strip. */
function strip(title, values, low, high) {
  const canvas = make("canvas", {role: "img", "aria-label": title});
  paint(canvas, 1, values.length, (_, c) => values[c], low, high);
  return make("div", {class: "strip"}, make("p", {}, title), canvas);
}

/** A small table of numbers, coloured. */
function numberTable(rows, columns, value, {low, high, won = null, outside = () => false} = {}) {
  const cells = r =>
    Array.from({length: columns}, (_, c) => {
      const x = value(r, c),
        [red, green, blue] = colour(x, low, high);
      const light = 0.3 * red + 0.6 * green + 0.1 * blue > 128;
      return make(
        "td",
        {
          class: `${won && won.r === r && won.c === c ? "won " : ""}${outside(r, c) ? "outside" : ""}`,
          style: `background:rgb(${red} ${green} ${blue});color:${light ? "#111" : "#fff"}`,
        },
        outside(r, c) ? "pad" : few(x, 3),
      );
    });
  return make(
    "table",
    {class: "numbers"},
    make(
      "tbody",
      {},
      Array.from({length: rows}, (_, r) => make("tr", {}, cells(r))),
    ),
  );
}
