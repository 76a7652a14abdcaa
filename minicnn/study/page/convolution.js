// A convolution opened up: an output pixel, an input pixel, or a weight is chosen, and its sum stands there term by term.

/** How the window at output (p, q) lies: the pixel under its tap (i, j), in the whole image. */
function geometry(data) {
  const [sr, sc] = data.stride,
    [ar, ac] = data.padding,
    [dr, dc] = data.dilation;
  return (p, q, i, j) => [p * sr - ar + i * dr, q * sc - ac + j * dc];
}

const summed = values => values.reduce((a, b) => a + b, 0);
const sides = x => [Math.min(0, ...x) < 0 ? -Math.max(...x.map(Math.abs)) : 0, Math.max(...x.map(Math.abs), 0)];

function openConvolution(data) {
  const views = [
    ["An output pixel (im2col)", openOutput],
    ["An input pixel's gradient (col2im)", openInput],
    ["A weight's gradient", openWeight],
  ].filter((view, i) => i === 0 || (i === 1 ? data.dx : data.dweight));
  const place = make("div");
  const show = i => place.replaceChildren(views[i][1](data));
  const [, , rows, columns] = data.outputs;
  const part =
    rows * columns < data.out[1] * data.out[2]
      ? `Of the ${by(data.out.slice(1))} outputs, ${by([rows, columns])} in the middle are opened, with all pixels that they see.`
      : "";
  show(0);
  return make(
    "div",
    {class: "open"},
    tabs(
      views.map(view => view[0]),
      0,
      show,
    ),
    part ? make("p", {class: "soft"}, part) : null,
    place,
  );
}

// ------------------------------------------------------------ forward
function openOutput(data) {
  const x = numbers(data.x),
    y = numbers(data.y),
    weight = numbers(data.weight),
    bias = numbers(data.bias);
  const [kh, kw] = data.kernel,
    [p0, q0, rows, columns] = data.outputs,
    [r0, c0, height, width] = data.pixels,
    under = geometry(data);
  const inGroup = weight.shape[1],
    filtersInGroup = data.out[0] / data.groups;
  const node = make("div", {class: "view"});
  let f = 0;

  function draw() {
    const first = Math.floor(data.filters[f] / filtersInGroup) * inGroup; // of the channels that this filter sees
    const terms = (p, q) => {
      // every product of the sum, in the order of im2col's rows
      const pixels = [],
        products = [];
      for (let c = 0; c < inGroup; c++)
        for (let i = 0; i < kh; i++)
          for (let j = 0; j < kw; j++) {
            const [r, s] = under(p, q, i, j);
            pixels.push(x.at(first + c, r - r0, s - c0));
            products.push(pixels.at(-1) * weight.at(f, c, i, j));
          }
      return {pixels, products};
    };
    const out = grid({
      title: `output, filter ${data.filters[f]}: choose a pixel`,
      rows,
      columns,
      top: p0,
      left: q0,
      value: (p, q) => y.at(f, p, q),
      pick: (p, q) => chosen(p0 + p, q0 + q),
    });
    let shown = 0;
    const inputs = make("div"),
      detail = make("div");
    let input = null;
    const drawInput = () => {
      input = grid({
        title: `input, channel ${first + shown}: the window`,
        rows: height,
        columns: width,
        top: r0,
        left: c0,
        value: (r, s) => x.at(first + shown, r, s),
      });
      inputs.replaceChildren(input.node);
    };
    const matrix = make("canvas", {role: "img", "aria-label": "the im2col matrix; its chosen column is framed"});
    const all = [];
    for (let p = 0; p < rows; p++) for (let q = 0; q < columns; q++) all.push(terms(p0 + p, q0 + q).pixels);
    const [low, high] = sides(all.flatMap(column => sides(column)));

    function chosen(p, q) {
      const {pixels, products} = terms(p, q),
        column = (p - p0) * columns + q - q0;
      const size = kh * kw,
        shares = Array.from({length: inGroup}, (_, c) => summed(products.slice(c * size, (c + 1) * size)));
      const order = shares.map((share, c) => c).sort((a, b) => Math.abs(shares[b]) - Math.abs(shares[a]));
      const b = bias ? bias.at(f) : 0,
        sum = summed(products) + b,
        engine = y.at(f, p - p0, q - q0);
      shown = order[0];
      drawInput();
      const [r, s] = under(p, q, 0, 0);
      const reach = [data.dilation[0] * (kh - 1) + 1, data.dilation[1] * (kw - 1) + 1];
      input.mark({r: r - r0, c: s - c0, h: reach[0], w: reach[1]});
      out.mark({r: p - p0, c: q - q0});
      const tall = Math.min(pixels.length, 180);
      paint(matrix, tall, all.length, (row, c) => all[c][Math.floor((row * pixels.length) / tall)], low, high);
      const within = (n, least, most) => Math.max(least, Math.min(n, most));
      matrix.style = `width:${within(all.length * 4, 60, 420)}px;height:${within(pixels.length * 3, 60, 180)}px`;
      const context = matrix.getContext("2d");
      context.fillStyle = dark.matches ? "#ffffff" : "#000000";
      context.globalAlpha = 0.45;
      context.fillRect(column, 0, 1, tall);
      const most = order.slice(0, 3),
        weights = Array.from({length: products.length}, (_, n) =>
          weight.at(f, Math.floor(n / size), Math.floor(n / kw) % kh, n % kw),
        );
      const outside = (i, j) => {
        const [a, e] = under(p, q, i, j);
        return a < 0 || e < 0 || a >= data.in[1] || e >= data.in[2];
      };
      detail.replaceChildren(
        make(
          "h4",
          {},
          inGroup > 3
            ? `Patch, filter and products of the ${most.length} channels with the largest shares of ${inGroup}`
            : "Patch, filter and products",
        ),
        ...most.map(c =>
          make(
            "div",
            {class: "product"},
            make("span", {class: "soft"}, `channel ${first + c}`),
            numberTable(kh, kw, (i, j) => pixels[c * size + i * kw + j], {low, high, outside}),
            "\u00d7",
            numberTable(kh, kw, (i, j) => weight.at(f, c, i, j), {low: sides(weights)[0], high: sides(weights)[1]}),
            "=",
            numberTable(kh, kw, (i, j) => products[c * size + i * kw + j], {low: sides(products)[0], high: sides(products)[1]}),
            make("span", {class: "number"}, `sum ${few(shares[c])}`),
          ),
        ),
        concluded(
          node,
          most.map(c => few(shares[c])).join(" + ") +
            (inGroup > most.length
              ? ` + ${few(summed(order.slice(3).map(c => shares[c])))} from the other ${inGroup - most.length} channels`
              : "") +
            (bias ? ` + ${few(b)} (bias)` : ""),
          sum,
          engine,
        ),
        make(
          "h4",
          {},
          `As im2col has it: column ${p * data.out[2] + q} of ${count(data.out[1] * data.out[2])}, ` +
            `${count(products.length)} numbers`,
        ),
        strip(`column of the im2col matrix: the patch, channel after channel`, pixels, low, high),
        strip(`row ${data.filters[f]} of the filter matrix`, weights, ...sides(weights)),
        strip(`their products, of which the output is the sum`, products, ...sides(products)),
      );
    }
    drawInput();
    node.replaceChildren(
      make(
        "div",
        {class: "controls"},
        choice("filter", data.filters, f, i => {
          f = i;
          draw();
        }),
      ),
      make(
        "div",
        {class: "grids"},
        inputs,
        out.node,
        make("div", {class: "grid still"}, make("p", {}, "im2col matrix: a column for each output pixel"), matrix),
      ),
      detail,
    );
    out.start();
  }
  draw();
  return node;
}

// ------------------------------------------------------------ the gradient of an input pixel
function openInput(data) {
  const dy = numbers(data.dy),
    dx = numbers(data.dx),
    weight = numbers(data.by_channel);
  const [kh, kw] = data.kernel,
    [p0, q0, rows, columns] = data.outputs,
    [r0, c0, height, width] = data.pixels;
  const filtersInGroup = data.out[0] / data.groups,
    channelsInGroup = data.in[0] / data.groups;
  const node = make("div", {class: "view"});
  let c = 0,
    k = 0;

  /** The windows that cover a pixel: output (p, q) through tap (i, j). */
  function covering(r, s) {
    const found = [];
    for (let i = 0; i < kh; i++)
      for (let j = 0; j < kw; j++) {
        const p = (r + data.padding[0] - i * data.dilation[0]) / data.stride[0],
          q = (s + data.padding[1] - j * data.dilation[1]) / data.stride[1];
        if (Number.isInteger(p) && Number.isInteger(q) && p >= 0 && q >= 0 && p < data.out[1] && q < data.out[2])
          found.push({p, q, i, j});
      }
    return found;
  }
  const opened = ({p, q}) => p >= p0 && q >= q0 && p < p0 + rows && q < q0 + columns;
  const usable = (r, s) =>
    r + r0 >= 0 && s + c0 >= 0 && r + r0 < data.in[1] && s + c0 < data.in[2] && covering(r + r0, s + c0).every(opened);

  function draw() {
    const first = Math.floor(data.channels[c] / channelsInGroup) * filtersInGroup; // of the filters that see this channel
    const back = grid({
      title: `gradient of input channel ${data.channels[c]}: choose a pixel`,
      rows: height,
      columns: width,
      top: r0,
      left: c0,
      value: (r, s) => (r + r0 < 0 || s + c0 < 0 || r + r0 >= data.in[1] || s + c0 >= data.in[2] ? NaN : dx.at(c, r, s)),
      usable,
      pick: (r, s) => chosen(r + r0, s + c0),
    });
    const from = grid({
      title: `output gradient of filter ${first + k}: the windows that cover it`,
      rows,
      columns,
      top: p0,
      left: q0,
      value: (p, q) => dy.at(first + k, p, q),
    });
    const detail = make("div");
    function chosen(r, s) {
      const windows = covering(r, s);
      const terms = windows.map(({p, q, i, j}) =>
        summed(Array.from({length: filtersInGroup}, (_, n) => weight.at(c, n, i, j) * dy.at(first + n, p - p0, q - q0))),
      );
      const sum = summed(terms),
        engine = dx.at(c, r - r0, s - c0);
      back.mark({r: r - r0, c: s - c0, kind: "won"});
      from.mark(...windows.map(({p, q}) => ({r: p - p0, c: q - q0})));
      detail.replaceChildren(
        make(
          "p",
          {},
          `Pixel (${r}, ${s}) was seen by ${windows.length} window${windows.length === 1 ? "" : "s"}. ` +
            "Each sends back the output's gradient times the weight that it saw the pixel through, " +
            `summed over ${filtersInGroup} filters; col2im gathers what the windows send:`,
        ),
        table(
          [
            "window (p, q)",
            "through tap (i, j)",
            `w[${first + k}] there`,
            `g[${first + k}] there`,
            `sum over ${filtersInGroup} filters`,
          ],
          windows.map(({p, q, i, j}, n) => [
            `(${p}, ${q})`,
            `(${i}, ${j})`,
            few(weight.at(c, k, i, j)),
            few(dy.at(first + k, p - p0, q - q0)),
            few(terms[n]),
          ]),
          [2, 3, 4],
        ),
        concluded(node, terms.map(t => few(t)).join(" + ") || "nothing", sum, engine),
      );
    }
    node.replaceChildren(
      make(
        "div",
        {class: "controls"},
        choice("input channel", data.channels, c, i => {
          c = i;
          draw();
        }),
        choice(
          "filter shown",
          Array.from({length: filtersInGroup}, (_, n) => first + n),
          k,
          i => {
            k = i;
            draw();
          },
        ),
      ),
      make("p", {class: "soft"}, "Crossed out: padding, or pixels that windows outside of the opened square see as well."),
      make("div", {class: "grids"}, back.node, from.node),
      detail,
    );
    back.start();
  }
  draw();
  return node;
}

// ------------------------------------------------------------ the gradient of a weight
function openWeight(data) {
  const x = numbers(data.x),
    dy = numbers(data.dy),
    dweight = numbers(data.dweight),
    shares = numbers(data.shares);
  const [kh, kw] = data.kernel,
    [p0, q0, rows, columns] = data.outputs,
    [r0, c0] = data.pixels,
    under = geometry(data);
  const node = make("div", {class: "view"});
  let f = 0,
    c = 0;
  function draw() {
    const k = data.filters[f];
    const of = grid({
      title: `gradient of the weights of filter ${k}, input channel ${data.channels[c]}: choose one`,
      rows: kh,
      columns: kw,
      value: (i, j) => dweight.at(f, c, i, j),
      usable: (i, j) => !Number.isNaN(dweight.at(f, c, i, j)),
      pick: chosen,
    });
    const place = make("div"),
      detail = make("div");
    function chosen(i, j) {
      const product = (p, q) => {
        const [r, s] = under(p0 + p, q0 + q, i, j);
        return dy.at(k, p, q) * x.at(data.channels[c], r - r0, s - c0);
      };
      const shown = grid({
        title: `output gradient times the pixel under tap (${i}, ${j}), at each output`,
        rows,
        columns,
        top: p0,
        left: q0,
        value: product,
      });
      const sum = summed(Array.from({length: rows * columns}, (_, n) => product(Math.floor(n / columns), n % columns)));
      const ofImages = Array.from({length: data.images}, (_, n) => shares.at(n, f, c, i, j)),
        engine = dweight.at(f, c, i, j),
        total = summed(ofImages);
      of.mark({r: i, c: j, kind: "won"});
      place.replaceChildren(shown.node);
      const terms = [
        `${few(sum)} from these ${rows * columns} places of the first image`,
        rows * columns < data.out[1] * data.out[2] ? `${few(ofImages[0] - sum)} from its others` : "",
        data.images > 1
          ? `${ofImages
              .slice(1)
              .map(share => few(share))
              .join(" + ")} from the other ${data.images > 2 ? `${data.images - 1} images` : "image"}`
          : "",
      ];
      detail.replaceChildren(concluded(node, terms.filter(Boolean).join(" + "), total, engine));
      node.dataset.part = sum;
    }
    node.replaceChildren(
      make(
        "div",
        {class: "controls"},
        choice("filter", data.filters, f, i => {
          f = i;
          draw();
        }),
        choice("input channel", data.channels, c, i => {
          c = i;
          draw();
        }),
      ),
      make("div", {class: "grids"}, of.node, place),
      detail,
    );
    if (Number.isNaN(dweight.at(f, c, 0, 0)))
      detail.replaceChildren(make("p", {}, "This filter stands in another group: it does not see this channel."));
    else of.start();
  }
  draw();
  return node;
}
