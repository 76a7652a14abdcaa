// One step: what its forward made and what its backward gave, side by side.

const KEYWORDS = /\b(def|return|if|else|for|in|is|not|and|or|None|True|False|lambda|with|raise|import|from|assert|yield)\b/;

/** Python source with line numbers; strings and comments stand back, keywords stand out. */
function code(source) {
  const lines = make("code"),
    parts = /("""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[^\n]*|\b[A-Za-z_]\w*\b)/g;
  const kind = text => (text.startsWith("#") ? "comment" : /^["']/.test(text) ? "string" : KEYWORDS.test(text) ? "word" : null);
  let number = source.first,
    fresh = true;
  const write = (text, as) =>
    text.split("\n").forEach((piece, i) => {
      if (i) {
        lines.append("\n");
        fresh = true;
      }
      if (fresh) {
        lines.append(make("span", {class: "at", "aria-hidden": "true"}, String(number++)));
        fresh = false;
      }
      if (piece) lines.append(as ? make("span", {class: as}, piece) : piece);
    });
  let from = 0;
  for (const found of source.text.matchAll(parts)) {
    write(source.text.slice(from, found.index), null);
    write(found[0], kind(found[0]));
    from = found.index + found[0].length;
  }
  write(source.text.slice(from), null);
  const where = source.where ? `${source.where}, line ${source.first}` : source.name;
  return make("div", {}, make("h4", {}, where), make("pre", {tabindex: "0", "aria-label": `source of ${source.name}`}, lines));
}

/** Without a font that is made for mathematics a browser sets a subscript on the line; then page.css lowers it. */
function lookAtMath() {
  const probe = make("div", {style: "position:absolute;visibility:hidden"});
  probe.innerHTML = "<math><msub><mi>x</mi><mi>x</mi></msub></math>";
  document.body.append(probe);
  const [base, sub] = [...probe.querySelectorAll("mi")].map(letter => letter.getBoundingClientRect().bottom);
  document.body.classList.toggle("subscripts-on-the-line", sub - base < 1.5);
  probe.remove();
}

/** MathML that formulas.py made of its own table: the one thing that is put in as markup. */
function equation(mathml) {
  const place = make("div", {class: "equation", tabindex: "0"});
  place.innerHTML = mathml;
  return place;
}

function shownArray(title, part, back) {
  return part ? make("div", {class: "array"}, planes(part.picture, title), histogram(part.histogram, back)) : null;
}

const titled = (name, shape) => `${name} (${by(shape)})`;

function drawStep(index, i, direction) {
  const about = index.steps[i],
    step = read(`s${i}`),
    op = index.operations[about.op];
  const value = n => read(`v${n}`);
  const out = value(step.output.value);
  const bytes = step.inputs.reduce((sum, input) => sum + input.bytes, step.output.bytes);
  const facts = [
    ...step.inputs.map(input => `${input.argument}: ${by(input.shape)}`),
    `\u2192 ${by(step.output.shape)}`,
    ...Object.entries(step.options).map(([name, text]) => `${name} = ${text}`),
    `${inBytes(bytes)} read and written`,
    ...(about.macs ? [`${count(about.macs)} multiply-adds`] : []),
    `forward ${inTime(about.forward_ms)}`,
    `backward ${inTime(about.backward_ms)}`,
  ];
  const parameters = step.inputs.filter(input => input.kind === "parameter" && value(input.value).array);
  const others = step.inputs.filter(input => input.kind !== "parameter" && value(input.value).array);

  const gradients = step.inputs.filter(input => input.argument in step.checks),
    ran = about.backward_ms !== null;
  const rules = op.backwards.filter(rule =>
    rule.targets.some(target => gradients.some(input => input.argument.split("[")[0] === target)),
  );
  const derivatives = gradients
    .map(input => op.backward[input.argument.split("[")[0]])
    .filter((one, n, all) => one && all.indexOf(one) === n);
  const cell = (side, ...what) => make("div", {class: `cell ${side}${side === direction ? " now" : ""}`}, what);
  const row = (there, back) => [cell("forward", there), cell("backward", back)];
  const sides = make(
    "div",
    {class: "sides"},
    row(make("h3", {}, "Forward"), make("h3", {}, "Backward")),
    row(
      op.forward ? equation(op.forward) : null,
      ran ? derivatives.map(equation) : make("p", {}, "No backward ran: no gradient was asked for here."),
    ),
    [...others, ...parameters].map(input =>
      row(
        shownArray(
          titled(input.kind === "parameter" ? input.name : `${input.argument}, from ${input.name}`, input.shape),
          value(input.value).array,
          false,
        ),
        gradients.includes(input) ? gradientOf(step, input, value) : null,
      ),
    ),
    row(
      shownArray(titled("y, the output", step.output.shape), out.array, false),
      ran ? shownArray(titled("g = dL/dy, what came back to the output", step.output.shape), out.grad, true) : null,
    ),
    row(code(op.source), ran ? rules.map(code) : null),
  );

  return [
    make(
      "h2",
      {},
      about.path || about.op,
      " ",
      make("span", {class: "soft"}, about.path ? `${about.op}${about.layer ? `, in a ${about.layer}` : ""}` : ""),
    ),
    make("p", {}, op.says),
    make(
      "ul",
      {class: "facts"},
      facts.map(fact => make("li", {}, fact)),
    ),
    sides,
    keptTable(step),
    step.opened ? make("section", {}, make("h3", {}, "Opened up"), opened(step.opened)) : null,
    Object.keys(step.checks).length ? checks(step) : null,
  ];
}

function gradientOf(step, input, value) {
  const share = step.shares[input.argument],
    parameter = input.kind === "parameter";
  const name = parameter ? `gradient of ${input.name}` : `gradient of ${input.argument}, on to ${input.name}`;
  if (!share) return shownArray(titled(name, input.shape), value(input.value).grad, true);
  return make(
    "div",
    {},
    shownArray(titled(name, input.shape), share, true),
    make(
      "p",
      {class: "soft"},
      `${input.name} has ${input.uses} uses; this is what comes back through this one. What arrives there is the sum.`,
    ),
  );
}

function keptTable(step) {
  const arrays = step.kept.filter(kept => kept.array),
    settings = step.kept.filter(kept => !kept.array);
  const head = make("h3", {}, `Kept for the backward: ${step.kept.length ? inBytes(step.kept_bytes) : "nothing"}`);
  return make(
    "section",
    {},
    head,
    arrays.length
      ? table(
          ["what", "as", "for", "why"],
          arrays.map(kept => [
            make("code", {}, kept.name),
            `${by(kept.shape)}, ${inBytes(kept.bytes)}${kept.shared ? `: ${kept.shared}, no copy` : ""}`,
            make("code", {}, kept.for.join(", ") || "\u2014"),
            kept.why,
          ]),
        )
      : null,
    settings.length
      ? make(
          "p",
          {class: "soft"},
          `${arrays.length ? "And" : "No array; only"} what the call was told, and the shapes that the gradients must have: `,
          make("code", {}, settings.map(kept => `${kept.name} = ${kept.says}`).join(", ")),
        )
      : null,
  );
}

// ------------------------------------------------------------ checked while you look
function checks(step) {
  const names = Object.keys(step.checks),
    place = make("div");
  const show = n => place.replaceChildren(...checkTable(names[n], step.checks[names[n]]));
  const all = Object.values(step.checks).flat(),
    wrong = all.filter(check => !check[6]).length,
    kinks = all.filter(check => check[7]).length;
  show(0);
  return make(
    "section",
    {class: "checked"},
    make("h3", {}, "Checked while you look"),
    make(
      "p",
      {},
      "Each number of a gradient below was compared with differences: its argument was moved a little way ahead and back, in " +
        "float64, and the forward run again. ",
      wrong
        ? make("span", {class: "bad"}, `${wrong} of ${all.length} disagree.`)
        : make("span", {class: "good"}, `All ${all.length} agree`),
      kinks
        ? `; ${kinks} sit on a kink, where the slopes ahead and back differ and any number between them is a fair gradient.`
        : wrong
          ? ""
          : ".",
    ),
    names.length > 1
      ? tabs(
          names.map(name => `gradient of ${name}`),
          0,
          show,
        )
      : null,
    place,
  );
}

function checkTable(name, rows) {
  const cells = ([, recorded, , numeric, step, error, , kink]) => [
    few(recorded, 7),
    kink ? `${few(kink[0], 3)} | ${few(kink[1], 3)}` : few(numeric, 7),
    few(step, 2),
    kink ? "\u2014" : few(error, 2),
  ];
  const chosen = make("div", {class: "chosen", "aria-live": "polite"});
  const verdict = check =>
    !check[6]
      ? make("span", {class: "bad"}, check[7] ? "kink, and outside of the slopes" : "differs")
      : check[7]
        ? "kink"
        : make("span", {class: "good"}, "agrees");
  const lines = rows.map((check, i) =>
    make(
      "tr",
      {tabindex: i ? "-1" : "0", "aria-selected": "false", onclick: () => pick(i), onfocus: () => pick(i)},
      make("td", {}, `[${check[0].join(", ")}]`),
      cells(check).map(text => make("td", {class: "number"}, text)),
      make("td", {}, verdict(check)),
    ),
  );
  function pick(i) {
    const [at, recorded, backward, numeric, step, error, right, kink] = rows[i];
    lines.forEach((line, j) => {
      line.setAttribute("aria-selected", String(i === j));
      line.tabIndex = i === j ? 0 : -1;
    });
    const part = [
      `The gradient of ${name} at [${at.join(", ")}]: the pass recorded ${few(recorded, 7)}; ` +
        `the same backward in float64 gives ${few(backward, 9)}. `,
    ];
    if (kink)
      part.push(
        `It sits on a kink: moved back the slope is ${few(kink[0], 6)}, ahead ${few(kink[1], 6)}; ` +
          `the gradient lies ${right ? "between" : "outside of"} them.`,
      );
    else
      part.push(
        `Moved by ${few(step, 2)} ahead and back, the forward changes as if it were ${few(numeric, 9)}: ` +
          `a relative error of ${few(error, 2)}.`,
      );
    chosen.replaceChildren(...part);
  }
  const body = make(
    "tbody",
    {
      onkeydown: event => {
        const move = {ArrowDown: 1, ArrowUp: -1}[event.key],
          now = lines.indexOf(document.activeElement);
        if (!move || now < 0 || !lines[now + move]) return;
        event.preventDefault();
        lines[now + move].focus();
      },
    },
    lines,
  );
  pick(0);
  return [
    chosen,
    make(
      "div",
      {class: "checks"},
      make(
        "table",
        {},
        make(
          "thead",
          {},
          make(
            "tr",
            {},
            ["where", "recorded", "by differences", "step", "relative error", ""].map((head, i) =>
              make("th", i > 0 && i < 5 ? {class: "number"} : {}, head),
            ),
          ),
        ),
        body,
      ),
    ),
  ];
}
