"""One forward and one backward pass as a page: a single HTML file that needs nothing else.

    subject = choose("resnet20")
    report = Report.of(subject)
    report.add_picture("Saliency", png, "where ...")        # the bytes of a PNG
    report.write("study.html")

The page's own files lie beside this one, in `page/`, and are put into the HTML as they are. Data stand in <script> elements as
JSON, one for each step and each value, which the page reads when it gets there; so a large model opens as fast as a small one.
"""
from __future__ import annotations

import base64
import html
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import minicnn
from minicnn import ops
from minicnn.autograd import Op, Tensor
from minicnn.study import heatmaps, steps
from minicnn.study.depth import Line, gradient_norms, weighted_layers
from minicnn.study.explained import explain
from minicnn.study.layout import layout
from minicnn.study.opened import share_of_each
from minicnn.study.recording import record
from minicnn.study.subject import Subject, choose
from minicnn.study.tape import Tape
from minicnn.threads import num_threads
from minicnn.train import default_threads, predict
from minicnn.weights import atomically

SCRIPTS = ("data.js", "pictures.js", "graph.js", "convolution.js", "opened.js", "step.js", "overview.js", "main.js")
MARK = "<!-- a pass of minicnn, laid open -->"


def run(model: str | None = None, image: str | None = None, *, out: str | None = None, training: bool = True,
        tell: Callable[[Subject], None] = lambda subject: None, **options: Any) -> tuple[Path, Subject, Report]:
    """Choose, record, check and write: what `minicnn study` does. Options as for `subject.choose`.

    out: the file; by default study-MODEL.html, with a number where there is one already.
    tell: called with what is studied, before the work begins.
    Raises FileExistsError where `out` is a file that is no report.
    """
    path = _vacant(out)
    steps.mathml("x")                           # says what is missing, before any work
    subject = choose(model, image, training=training, **options)
    tell(subject)
    path = path or _next_free(f"study-{subject.name}")
    report = Report.of(subject, training)
    report.explain()
    report.write(path)
    return path, subject, report


class Report:
    """A recorded pass with all that its page shows. `add_picture` puts more on it, `write` makes the file."""

    def __init__(self, subject: Subject, tape: Tape, about: dict[str, Any], lines: list[Line],
                 of_steps: list[dict[str, Any]], of_values: list[dict[str, Any]]) -> None:
        self.subject, self.tape, self.about, self.lines = subject, tape, about, lines
        self.of_steps, self.of_values = of_steps, of_values
        self.pictures: list[dict[str, str]] = []

    @classmethod
    def of(cls, subject: Subject, training: bool = True) -> Report:
        """Run the subject's batch forward and backward with recording on, check each step's gradient, and measure the depth."""
        model, x = subject.model, subject.inputs
        probabilities = predict(model, subject.images[:1], subject.normalize)[0]
        before = model.state_dict()                 # training moves the running statistics; they are put back
        with num_threads(default_threads(x.shape[1:])), record() as tape:
            logits = model(Tensor(x, requires_grad=True), train=training, rng=np.random.default_rng(0))
            loss = ops.cross_entropy(logits, subject.labels)
            loss.backward()
        model.load_state_dict(before)
        lines = gradient_norms(subject.fresh(), x, subject.labels)
        rng, share = np.random.default_rng(0), share_of_each(tape)
        with num_threads(1):                        # each check is small
            of_steps = [steps.of_step(step, rng, share) for step in _shown(tape.steps, "checking gradients")]
        about = {"model": subject.name, "parameters": sum(p.size for p in model.parameters()), "weights": subject.weights,
                 "image": subject.image_name, "label": subject.classes[int(subject.labels[0])], "said_by": subject.said_by,
                 "batch": len(x), "training": training, "in_shape": list(x.shape[1:]), "type": str(x.dtype), "loss": loss.item(),
                 "classes": [[subject.classes[i], float(probabilities[i])] for i in np.argsort(-probabilities, kind="stable")[:5]],
                 "version": minicnn.__version__,
                 "picture": {"shape": list(subject.images.shape[1:]),
                             "pixels": base64.b64encode(subject.images[0].tobytes()).decode("ascii")}}
        return cls(subject, tape, about, lines, of_steps, [steps.of_value_on_page(value) for value in tape.values])

    def add_picture(self, title: str, png: bytes, caption: str = "") -> None:
        """Put a picture (the bytes of a PNG) on the first page, under this title."""
        if not png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"the picture {title!r} is no PNG: its first bytes are {png[:8]!r}")
        self.pictures.append({"title": title, "caption": caption, "png": base64.b64encode(png).decode("ascii")})

    def explain(self) -> None:
        """Put saliency, Grad-CAM and the receptive field on the first page, of the label's class; nothing without Pillow."""
        if importlib.util.find_spec("PIL") is None:
            return
        subject, target = self.subject, int(self.subject.labels[0])
        found = explain(subject.model, subject.normalize, subject.images[0], target, draws=8)
        for title, pixels, caption in found.pictures(subject.classes[target]).values():
            self.add_picture(title, heatmaps.png(pixels), caption)

    def html(self) -> str:
        """The whole page."""
        tape, plan = self.tape, layout(self.tape)
        operations = {step.op: step.operation for step in tape.steps if isinstance(step.operation, Op)}
        index = {
            "about": self.about, "steps": [steps.outline(step) for step in tape.steps], "lanes": plan.lanes,
            "edges": [list(edge) for edge in plan.edges], "width": plan.width,
            "operations": {name: steps.of_op(op) for name, op in operations.items()},
            "depth": {"layers": weighted_layers(self.subject.model), "lines": [line._asdict() for line in self.lines]},
            "dead": steps.dead_units(tape), "pictures": self.pictures}
        blocks = [_block("index", index), *(_block(f"s{n}", step) for n, step in enumerate(self.of_steps)),
                  *(_block(f"v{n}", value) for n, value in enumerate(self.of_values))]
        page = resources.files("minicnn.study") / "page"
        parts = {"title": html.escape(f"{self.subject.name}: a forward and a backward pass"),
                 "mark": MARK, "style": (page / "page.css").read_text("utf-8"),
                 "script": "\n".join((page / name).read_text("utf-8") for name in SCRIPTS), "data": "\n".join(blocks)}
        return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (page / "page.html").read_text("utf-8"))

    def write(self, path: Path | str) -> None:
        """Write the page to a file, at once or not at all."""
        text = self.html()
        atomically(Path(path), lambda temporary: _write_text(temporary, text))

    @property
    def wrong(self) -> int:
        """How many of the checked numbers disagree with their differences."""
        return sum(not check[6] for step in self.of_steps for checks in step["checks"].values() for check in checks)

    @property
    def checked(self) -> int:
        """How many numbers were checked."""
        return sum(len(checks) for step in self.of_steps for checks in step["checks"].values())


def _block(name: str, value: Any) -> str:
    """JSON in a <script>: in ASCII, and without any sign that HTML would read."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _finite(value: Any) -> Any:
    """The same with null for what is no finite number."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def _shown(items: list[Any], what: str) -> Iterable[Any]:
    """The same items, with a bar while they are gone through, where tqdm is installed and somebody looks."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    bar: Iterable[Any] = importlib.import_module("tqdm").tqdm(items, desc=what, unit="step", leave=False, disable=None)
    return bar


def _write_text(temporary: str, text: str) -> None:
    Path(temporary).write_text(text, encoding="utf-8")


def _vacant(out: str | None) -> Path | None:
    """The file to write, if it is new or an earlier report; FileExistsError if it is somebody's."""
    if out is None:
        return None
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{out} is no file that can be written: " + ("it is a folder" if path.is_dir() else
                                                                             f"the folder {path.parent} does not exist"))
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(400):
                raise FileExistsError(f"{out} exists already and is no report of minicnn: name another file with --out")
    return path


def _next_free(stem: str) -> Path:
    number = 1
    while (path := Path(f"{stem}.html" if number == 1 else f"{stem}-{number}.html")).exists():
        number += 1
    return path
