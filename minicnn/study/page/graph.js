// The list of all steps, with lines between those that hand numbers on: a residual branch is a lane of its own.

const ROW = 28,
  LANE = 15;

class Graph {
  /** go(i): what a click on step i does. */
  constructor(place, index, go) {
    this.place = place;
    const {steps, lanes, edges, width} = index,
      left = 10;
    const x = lane => left + lane * LANE,
      y = row => (row + 0.5) * ROW; // row 0 is what comes from outside
    const svg = drawn("svg", {width: x(width), height: (steps.length + 1) * ROW, "aria-hidden": "true"});
    this.edges = edges.map(([source, target, lane]) => {
      const from = [x(source < 0 ? lane : lanes[source]), y(source + 1)],
        to = [x(lanes[target]), y(target + 1)],
        along = x(lane);
      const down = Math.min(from[1] + ROW, to[1]),
        up = Math.max(to[1] - ROW, down);
      const bend = (a, b) =>
        a[0] === b[0] ? `L ${b[0]} ${b[1]}` : `C ${a[0]} ${(a[1] + b[1]) / 2}, ${b[0]} ${(a[1] + b[1]) / 2}, ${b[0]} ${b[1]}`;
      const straight = target === source + 1;
      const path = straight
        ? `M ${from} ${bend(from, to)}`
        : `M ${from} ${bend(from, [along, down])} L ${along} ${up} ${bend([along, up], to)}`;
      const line = drawn("path", {class: "edge", d: path});
      svg.append(line);
      return {source, target, line};
    });
    this.dots = steps.map((step, i) => {
      const dot = drawn("circle", {class: "dot", cx: x(lanes[i]), cy: y(i + 1), r: 4.5});
      svg.append(dot);
      return dot;
    });
    const pad = `padding-left:${x(width) + 8}px`;
    this.buttons = steps.map((step, i) =>
      make(
        "button",
        {type: "button", style: pad, tabindex: "-1", title: `${step.op} ${step.path}`, onclick: () => go(i)},
        make("span", {class: lanes[i] ? "op branch" : "op"}, step.op),
        make("span", {class: "path"}, step.path),
      ),
    );
    const start = make(
      "li",
      {},
      make("button", {type: "button", style: pad, tabindex: "-1", onclick: () => go(-1)}, make("span", {class: "op"}, "input")),
    );
    place.append(
      make(
        "ol",
        {},
        start,
        this.buttons.map(button => make("li", {}, button)),
      ),
    );
    place.querySelector("ol").append(svg);
    // One stop of the Tab key for the whole list; inside it the arrows up and down.
    this.all = [start.firstChild, ...this.buttons];
    this.all[0].tabIndex = 0;
    place.addEventListener("keydown", event => {
      const move = {ArrowDown: 1, ArrowUp: -1}[event.key],
        at = this.all.indexOf(document.activeElement);
      if (!move || at < 0) return;
      event.preventDefault();
      const other = this.all[Math.max(0, Math.min(this.all.length - 1, at + move))];
      this.stop(other);
      other.focus();
    });
  }

  stop(button) {
    for (const other of this.all) other.tabIndex = other === button ? 0 : -1;
  }

  /** Light step i up (-1: none), and what leads to it (forward) or what its gradient comes from (backward). */
  light(i, direction) {
    this.place.classList.toggle("backward", direction === "backward");
    this.dots.forEach((dot, j) => dot.classList.toggle("lit", j === i));
    for (const {source, target, line} of this.edges)
      line.classList.toggle("lit", i >= 0 && (direction === "backward" ? source === i : target === i));
    this.buttons.forEach((button, j) =>
      j === i ? button.setAttribute("aria-current", "step") : button.removeAttribute("aria-current"),
    );
    const now = this.all[i + 1];
    this.stop(now);
    const box = this.place.getBoundingClientRect(),
      row = now.getBoundingClientRect();
    if (row.top < box.top + ROW || row.bottom > box.bottom - ROW) this.place.scrollTop += row.top - box.top - box.height / 2;
  }
}
