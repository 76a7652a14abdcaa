// The first page: the image, what the model says, how strong the gradient is along the depth, which ReLUs are dead, where the
// time goes.

function drawOverview(index, go) {
  const about = index.about,
    steps = index.steps,
    total = key => steps.reduce((sum, step) => sum + (step[key] || 0), 0);
  const said = about.classes.map(([name, p]) => [name, `${few(100 * p, 3)} %`]);
  const facts = [
    `${count(about.parameters)} parameters`,
    `weights: ${about.weights}`,
    `${about.type}, ${by(about.in_shape)}`,
    (about.batch === 1 ? "this image alone" : `a batch of ${about.batch}: this image and ${about.batch - 1} more`) +
      (about.training ? ", as in training" : ", as at inference"),
    `loss ${few(about.loss)}`,
    `${steps.length} steps`,
    `forward ${inTime(total("forward_ms"))}`,
    `backward ${inTime(total("backward_ms"))}`,
    `${count(total("macs"))} multiply-adds forward`,
  ];
  return [
    make("h2", {}, `${about.model}, one pass`),
    make(
      "ul",
      {class: "facts"},
      facts.map(fact => make("li", {}, fact)),
    ),
    make(
      "p",
      {},
      "Every operation of one forward and one backward pass, as it ran. The list shows them in order; a branch is a lane of its " +
        "own. Go on with the right arrow key, or choose a step. " +
        "The times are those of this one recorded pass; a first call includes what is done once.",
    ),
    make(
      "div",
      {class: "overview-grid"},
      make(
        "section",
        {},
        make("h3", {}, "The image"),
        photograph(about.picture, `${about.image}; labelled ${about.label}, ${about.said_by}`),
      ),
      make("section", {}, make("h3", {}, "What the model says, at inference"), table(["class", "probability"], said, [1])),
      index.pictures.map(picture =>
        make(
          "section",
          {class: "given-picture"},
          make("h3", {}, picture.title),
          make("img", {src: `data:image/png;base64,${picture.png}`, alt: picture.title}),
          picture.caption ? make("p", {class: "soft"}, picture.caption) : null,
        ),
      ),
      depthChart(index.depth),
      deadUnits(index.dead, about.batch, go),
      slowest(steps, go),
    ),
  ];
}

/** An image as it is: grey, or in its colours. */
function photograph({shape, pixels}, title) {
  const [channels, rows, columns] = shape,
    bytes = bytesOf(pixels),
    canvas = make("canvas", {role: "img", "aria-label": title, width: columns, height: rows});
  const context = canvas.getContext("2d"),
    image = context.createImageData(columns, rows),
    size = rows * columns;
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[(channels === 3 ? c * size : 0) + i];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  canvas.style.width = `${columns * Math.max(1, Math.floor(224 / columns))}px`;
  return make("figure", {}, canvas, make("figcaption", {}, title));
}

// ------------------------------------------------------------ the gradient along the depth
const DASHES = ["", "7 4", "2 4", "10 3 2 3"]; // beside the colours, which page.css has

function depthChart({layers, lines}) {
  const width = 560,
    height = 260,
    left = 52,
    bottom = 34,
    n = Math.max(...lines.map(line => line.norms.length));
  const logs = lines.map(line => line.norms.map(x => (x > 0 && Number.isFinite(x) ? Math.log10(x) : NaN)));
  const all = logs.flat().filter(Number.isFinite);
  if (!all.length) return null;
  const low = Math.floor(Math.min(...all)),
    high = Math.max(low + 1, Math.ceil(Math.max(...all)));
  const x = i => left + (n > 1 ? i / (n - 1) : 0.5) * (width - left - 12),
    y = v => 8 + ((high - v) / (high - low)) * (height - bottom - 8);
  const svg = drawn("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "chart",
    role: "img",
    "aria-label": "norm of the gradient at the output of each layer with weights",
  });
  const every = Math.ceil((high - low) / 8);
  for (let v = low; v <= high; v += every)
    svg.append(
      drawn("line", {class: "grid-line", x1: left, x2: width - 12, y1: y(v), y2: y(v)}),
      drawn("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, `1e${v}`.replace("-", "\u2212")),
    );
  logs.forEach((line, i) => {
    let path = "",
      pen = false;
    line.forEach((v, j) => {
      if (Number.isFinite(v)) {
        path += `${pen ? "L" : "M"} ${x(j).toFixed(1)} ${y(v).toFixed(1)} `;
        pen = true;
      } else pen = false;
    });
    svg.append(drawn("path", {d: path, class: `line-${i % 4}`, "stroke-dasharray": DASHES[i % 4]}));
  });
  svg.append(
    drawn("text", {x: left, y: height - 6}, `${layers[0]} (at the image)`),
    drawn("text", {x: width - 12, y: height - 6, "text-anchor": "end"}, `${layers.at(-1)} (at the loss)`),
  );
  const named = line =>
    `${line.residual ? "with" : "without"} residual paths, ${line.batch_norm ? "with" : "without"} batch norm` +
    (line.given ? " (as this model is built)" : "");
  const legend = make(
    "ul",
    {class: "legend"},
    lines.map((line, i) =>
      make(
        "li",
        {},
        drawn(
          "svg",
          {viewBox: "0 0 26 10"},
          drawn("line", {
            x1: 0,
            x2: 26,
            y1: 5,
            y2: 5,
            class: `line-${i % 4}`,
            "stroke-width": 2.5,
            "stroke-dasharray": DASHES[i % 4],
          }),
        ),
        named(line),
      ),
    ),
  );
  const said = lines.map(line => {
    const first = line.norms[0],
      last = line.norms.at(-1),
      times = last / first;
    if (!line.norms.every(v => Number.isFinite(v)) || line.norms.some(v => v === null))
      return [named(line), few(line.loss), few(first, 3), few(last, 3), "left the range of its numbers"];
    return [
      named(line),
      few(line.loss),
      few(first, 3),
      few(last, 3),
      first === 0 ? "vanishes" : `${few(Math.max(times, 1 / times), 3)} times ${times >= 1 ? "smaller" : "larger"} at the image`,
    ];
  });
  return make(
    "section",
    {},
    make("h3", {}, "The gradient along the depth"),
    make(
      "p",
      {class: "soft"},
      "Euclidean norm of dL/dy at the output of each convolution and fully connected layer, on a logarithmic scale. One training " +
        "pass each over this batch, with the first, untrained weights, the same in all lines; " +
        `only ${lines.some(line => line.residual) ? "the shortcuts and the batch norms are" : "the batch norms are"} there or not.`,
    ),
    svg,
    legend,
    table(["", "loss", "first layer", "last layer", "the gradient is"], said, [1, 2, 3]),
  );
}

function deadUnits(dead, batch, go) {
  if (!dead.length) return null;
  return make(
    "section",
    {},
    make("h3", {}, "Zeros behind each ReLU"),
    make(
      "p",
      {class: "soft"},
      "The share of numbers that are 0, and how many channels (behind a fully connected layer: units) are 0 everywhere in the " +
        "batch: dead for it, no gradient passes." +
        (batch === 1 ? " Of one image alone, which says little of others." : ""),
    ),
    make(
      "div",
      {class: "bars"},
      dead.flatMap(relu => [
        make("button", {type: "button", onclick: () => go(relu.step)}, relu.path || "relu"),
        make("div", {class: "bar"}, make("i", {class: "zero", style: `width:${100 * relu.zeros}%`})),
        make("span", {}, `${few(100 * relu.zeros, 2)} %; ${relu.dead} of ${relu.units} dead`),
      ]),
    ),
  );
}

function slowest(steps, go) {
  const time = step => step.forward_ms + (step.backward_ms || 0);
  const order = steps
      .map((_, i) => i)
      .sort((a, b) => time(steps[b]) - time(steps[a]))
      .slice(0, 12),
    most = time(steps[order[0]]);
  return make(
    "section",
    {},
    make("h3", {}, "Where the time went"),
    make("p", {class: "soft"}, `The ${order.length} steps that took longest, forward and backward together.`),
    make(
      "div",
      {class: "bars"},
      order.flatMap(i => [
        make("button", {type: "button", onclick: () => go(i)}, `${steps[i].path ? `${steps[i].path} ` : ""}${steps[i].op}`),
        make("div", {class: "bar"}, make("i", {style: `width:${(100 * time(steps[i])) / most}%`})),
        make("span", {}, `${inTime(steps[i].forward_ms)} + ${inTime(steps[i].backward_ms)}`),
      ]),
    ),
  );
}
