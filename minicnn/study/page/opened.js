// Max-pooling and batch norm opened up.

function opened(data) {
  return {convolution: openConvolution, pooling: openPooling, "batch norm": openNorm}[data.kind](data);
}

// ------------------------------------------------------------ which pixel won
function openPooling(data) {
  const x = numbers(data.x),
    y = numbers(data.y),
    dy = numbers(data.dy),
    dx = numbers(data.dx);
  const [kh, kw] = data.kernel,
    [p0, q0, rows, columns] = data.outputs,
    [r0, c0, height, width] = data.pixels,
    under = geometry(data);
  const node = make("div", {class: "open"});
  let c = 0;
  const inside = (r, s) => r >= 0 && s >= 0 && r < data.in[1] && s < data.in[2];
  function draw() {
    const see = grid({
      title: `input, channel ${data.channels[c]}: the window`,
      rows: height,
      columns: width,
      top: r0,
      left: c0,
      value: (r, s) => x.at(c, r, s),
      usable: (r, s) => inside(r + r0, s + c0),
    });
    const out = grid({
      title: "output: choose a pixel",
      rows,
      columns,
      top: p0,
      left: q0,
      value: (p, q) => y.at(c, p, q),
      pick: (p, q) => chosen(p + p0, q + q0),
    });
    const back = grid({
      title: "gradient of the input: it went to the winner",
      rows: height,
      columns: width,
      top: r0,
      left: c0,
      value: (r, s) => dx.at(c, r, s),
    });
    const detail = make("div");
    function chosen(p, q) {
      let won = null,
        best = -Infinity,
        ties = 0;
      for (let i = 0; i < kh; i++)
        for (let j = 0; j < kw; j++) {
          const [r, s] = under(p, q, i, j);
          if (!inside(r, s)) continue;
          const value = x.at(c, r - r0, s - c0);
          if (value > best) {
            won = {r: i, c: j, pixel: [r, s]};
            best = value;
            ties = 0;
          } else if (value === best) ties += 1;
        }
      const g = dy.at(c, p - p0, q - q0),
        [r, s] = won.pixel,
        [wr, ws] = under(p, q, 0, 0);
      see.mark({r: wr - r0, c: ws - c0, h: kh, w: kw}, {r: r - r0, c: s - c0, kind: "won"});
      back.mark({r: r - r0, c: s - c0, kind: "won"});
      out.mark({r: p - p0, c: q - q0});
      detail.replaceChildren(
        make(
          "div",
          {class: "product"},
          numberTable(
            kh,
            kw,
            (i, j) => {
              const [a, b] = under(p, q, i, j);
              return inside(a, b) ? x.at(c, a - r0, b - c0) : NaN;
            },
            {low: see.low ?? -Math.abs(best), high: Math.abs(best) || 1, won, outside: (i, j) => !inside(...under(p, q, i, j))},
          ),
        ),
        make(
          "p",
          {},
          `Pixel (${r}, ${s}) won with ${few(best)}` +
            (ties ? `, the first of ${ties + 1} that are equal: the function has a kink here. ` : ". ") +
            `It gets all of the window's gradient, ${few(g)}; the pixel's gradient is ${few(dx.at(c, r - r0, s - c0))} in all.`,
        ),
      );
      node.dataset.winner = `${r},${s}`;
    }
    node.replaceChildren(
      make(
        "div",
        {class: "controls"},
        choice("channel", data.channels, c, i => {
          c = i;
          draw();
        }),
      ),
      make("div", {class: "grids"}, see.node, out.node, back.node),
      detail,
    );
    out.start();
  }
  draw();
  return node;
}

// ------------------------------------------------------------ the three terms of batch norm's backward
function openNorm(data) {
  const x = numbers(data.x),
    dy = numbers(data.dy),
    dx = numbers(data.dx),
    [, , rows, columns] = data.pixels;
  const node = make("div", {class: "open"});
  let c = 0;
  function draw() {
    const factor = data.gamma[c] * data.inv_std[c],
      hat = (r, s) => (x.at(c, r, s) - data.mean[c]) * data.inv_std[c];
    const terms = [
      (r, s) => factor * dy.at(c, r, s),
      () => -factor * data.mean_dy[c],
      (r, s) => -factor * hat(r, s) * data.mean_dy_x_hat[c],
    ];
    const names = ["1: the gradient, scaled", "2: less its mean", "3: less what moves the variance"];
    const detail = make("div");
    const places = Array.from({length: rows * columns}, (_, n) => [Math.floor(n / columns), n % columns]);
    const end = Math.max(...places.flatMap(([r, s]) => [dx.at(c, r, s), ...terms.map(term => term(r, s))]).map(Math.abs));
    const shown = [
      grid({title: "gradient of the input: choose a number", rows, columns, value: (r, s) => dx.at(c, r, s), pick: chosen, end}),
      ...terms.map((value, i) => grid({title: names[i], rows, columns, value, end})), // on one scale with their sum
      grid({title: "x hat", rows, columns, value: hat}),
    ];
    function chosen(r, s) {
      shown.forEach(one => one.mark({r, c: s}));
      const values = terms.map(term => term(r, s)),
        sum = summed(values),
        engine = dx.at(c, r, s);
      detail.replaceChildren(
        table(
          ["term", "", "here"],
          [
            ["\u03b3 / \u221a(\u03c3\u00b2 + \u03b5) \u00b7 g", `${few(factor)} \u00b7 ${few(dy.at(c, r, s))}`, few(values[0])],
            [
              "\u2212 \u03b3 / \u221a(\u03c3\u00b2 + \u03b5) \u00b7 mean(g)",
              `\u2212 ${few(factor)} \u00b7 ${few(data.mean_dy[c])}`,
              few(values[1]),
            ],
            [
              "\u2212 \u03b3 / \u221a(\u03c3\u00b2 + \u03b5) \u00b7 x hat \u00b7 mean(g x hat)",
              `\u2212 ${few(factor)} \u00b7 ${few(hat(r, s))} \u00b7 ${few(data.mean_dy_x_hat[c])}`,
              few(values[2]),
            ],
          ],
          [2],
        ),
        concluded(node, values.map(v => few(v)).join(" + "), sum, engine),
      );
    }
    node.replaceChildren(
      make(
        "div",
        {class: "controls"},
        choice("channel", data.channels, c, i => {
          c = i;
          draw();
        }),
        make(
          "span",
          {class: "soft"},
          `over ${count(data.numbers)} numbers: mean ${few(data.mean[c])}, ` +
            `1/\u221a(\u03c3\u00b2 + \u03b5) ${few(data.inv_std[c])}, ` +
            `\u03b3 ${few(data.gamma[c])}, \u03b2 ${few(data.beta[c])}`,
        ),
      ),
      make(
        "div",
        {class: "grids"},
        shown.map(one => one.node),
      ),
      detail,
    );
    shown[0].start();
  }
  draw();
  return node;
}
