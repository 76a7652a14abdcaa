"""What a notebook shows of a Tensor, a model and a tape: whole, small, and with every name escaped."""
import html.parser

import numpy as np
import pytest

import minicnn as mc
from minicnn.layers import Conv2d, GlobalAvgPool2d, Linear, ReLU, Residual, Sequential

HOSTILE = '<script>alert("1")</script>&'


class Reader(html.parser.HTMLParser):
    """The tags of a page, which must close in order, and the words of each cell."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.rows = [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], "a tag was left open"

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text


@pytest.mark.parametrize(("array", "rows"), [
    (np.array([[1.0, -2.5], [0.125, 1e-9]]), [["1", "-2.5"], ["0.125", "1e-09"]]), (np.float32(2.5), [["2.5"]]),
    (np.array([1, 2, 30_000_000]), [["1", "2", "30000000"]]), (np.array([True, False]), [["True", "False"]]),
    (np.array([np.nan, np.inf]), [["nan", "inf"]]), (np.zeros((0, 3)), [])])
def test_a_small_tensor_shows_its_numbers(array, rows):
    page = mc.Tensor(array)._repr_html_()
    assert Reader(page).rows == rows
    assert str(mc.Tensor(array).dtype) in page


def test_a_large_tensor_shows_how_large_its_numbers_are():
    values = np.linspace(-1, 3, 2 * 3 * 40 * 40).reshape(2, 3, 40, 40)
    page = mc.Tensor(values, requires_grad=True)._repr_html_()
    assert "2 x 3 x 40 x 40, float64, a leaf that requires a gradient; from -1 to 3, mean 1" in page
    assert len(page) < 3000 and set(Reader(page).tags) == {"details", "summary", "b", "pre"}


def test_a_tensor_says_where_it_comes_from_and_what_came_back():
    x = mc.Tensor(np.array([3.0, 4.0]), requires_grad=True)
    assert "from mul" in (x * x)._repr_html_()
    (x * x).sum().backward()
    assert "gradient of norm 10" in x._repr_html_()
    hostile = mc.op(lambda x: x)
    hostile.__name__ = HOSTILE
    hostile.backward("x")(lambda dy: dy)
    assert "<script" not in hostile(x)._repr_html_() and "&lt;script&gt;" in hostile(x)._repr_html_()


def model():
    body = Sequential([Conv2d(2, 3, padding=1).named(HOSTILE), ReLU()])
    return Sequential([Residual(body), GlobalAvgPool2d(), Linear(3).named("head")], (2, 4, 4))


def test_a_model_shows_its_summary():
    built = model()
    rows, summary = Reader(built._repr_html_()).rows, built.summary()
    assert "2 x 4 x 4 &rarr; 3, float32" in built._repr_html_()
    assert [row[0] for row in rows[1:-1]] == [row.path for row in summary.rows]
    assert [row[2:4] for row in rows[1:-1]] == [[" x ".join(map(str, r.out_shape)), f"{r.parameters:,}"] for r in summary.rows]
    assert rows[-1][0] == "total" and rows[-1][3] == f"{sum(p.size for p in built.parameters()):,}"
    assert "<script" not in built._repr_html_()
    unbuilt = Sequential([Conv2d(2, 3).named(HOSTILE)])._repr_html_()
    assert unbuilt.startswith("<pre>Sequential(") and "<script" not in unbuilt
    assert len(mc.models.resnet110()._repr_html_()) < 100_000


def test_a_tape_shows_its_steps():
    with mc.study.record() as tape:
        mc.ops.cross_entropy(model()(np.ones((1, 2, 4, 4), np.float32), train=True), np.array([1])).backward()
    page = tape._repr_html_()
    rows = Reader(page).rows
    assert [row[:2] for row in rows[1:]] == [[str(step.number), step.op] for step in tape.steps]
    assert any(row[1] == "conv2d" and row[2].endswith(HOSTILE) for row in rows) and "<script" not in page
    by_op = {row[1]: row for row in rows[1:]}
    linear = next(step for step in tape.steps if step.op == "linear")
    assert by_op["linear"][3] == "1 x 3" and by_op["linear"][5] == f"{np.linalg.norm(linear.grad):.4g}"
    with mc.study.record() as empty:
        pass
    assert Reader(empty._repr_html_()).rows[1:] == []
