// The walk: the overview, every step forward, then every step with a backward, from the last to the first.

function begin() {
  const index = read("index"),
    element = id => document.getElementById(id);
  const forward = index.steps.map((_, step) => ({direction: "forward", step}));
  const back = index.steps
    .map((_, step) => ({direction: "backward", step}))
    .filter(({step}) => index.steps[step].backward_ms !== null)
    .reverse();
  const walk = [{direction: "overview", step: -1}, ...forward, ...back];
  const name = ({direction, step}) => (direction === "overview" ? direction : `${direction}-${step}`);
  const where = new Map(walk.map((place, i) => [name(place), i]));
  let at = -1;

  const graph = new Graph(element("graph"), index, step =>
    go(
      where.get(step < 0 ? "overview" : name({direction: walk[at].direction === "backward" ? "backward" : "forward", step})) ??
        where.get(`forward-${step}`),
    ),
  );

  function go(position) {
    at = Math.max(0, Math.min(walk.length - 1, position));
    const {direction, step} = walk[at],
      main = element("main");
    main.replaceChildren(
      ...(direction === "overview"
        ? drawOverview(index, step => go(where.get(`forward-${step}`)))
        : drawStep(index, step, direction)
      )
        .flat(Infinity)
        .filter(Boolean),
    );
    graph.light(step, direction);
    element("slider").value = at;
    element("previous").disabled = at === 0;
    element("next").disabled = at === walk.length - 1;
    element("match").disabled = other() === undefined;
    const text =
      direction === "overview"
        ? `overview; ${forward.length} steps forward, ${back.length} back`
        : direction === "forward"
          ? `forward ${step + 1} of ${forward.length}`
          : `backward ${at - forward.length} of ${back.length}`;
    element("position").textContent = text;
    element("slider").setAttribute("aria-valuetext", text);
    main.dataset.at = name(walk[at]);
    history.replaceState(null, "", `#${name(walk[at])}`);
    const top = main.getBoundingClientRect().top - document.querySelector("header").offsetHeight;
    if (scrollY > 0 && top < 0) scrollBy(0, top);
  }
  const other = () => {
    const {direction, step} = walk[at];
    return direction === "overview"
      ? undefined
      : where.get(name({direction: direction === "forward" ? "backward" : "forward", step}));
  };
  const match = () => {
    if (other() !== undefined) go(other());
  };

  lookAtMath();
  element("title").textContent = document.title;
  element("slider").max = walk.length - 1;
  element("slider").addEventListener("input", event => go(Number(event.target.value)));
  element("to-overview").addEventListener("click", () => go(0));
  element("previous").addEventListener("click", () => go(at - 1));
  element("next").addEventListener("click", () => go(at + 1));
  element("match").addEventListener("click", match);
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, input")) return;
    const act = {
      ArrowRight: () => go(at + 1),
      ArrowLeft: () => go(at - 1),
      Home: () => go(0),
      End: () => go(walk.length - 1),
      b: match,
    }[event.key];
    if (!act || (event.target.closest("pre, .equation, .scroll") && event.key.startsWith("Arrow"))) return; // these scroll sideways
    event.preventDefault();
    act();
  });
  addEventListener("hashchange", () => {
    const asked = where.get(location.hash.slice(1));
    if (asked !== undefined && asked !== at) go(asked);
  });
  dark.addEventListener("change", () => go(at));
  go(where.get(location.hash.slice(1)) ?? 0);
}

begin();
