"""The page of `minicnn study` in a real browser: Chromium without a window, driven by selenium.

Skips, with the reason, where there is no browser; with MINICNN_REQUIRE_BROWSER=1 that is a failure.
"""
import json
import os
import shutil

import numpy as np
import pytest
from study_page import HOSTILE, subject

import minicnn as mc
from minicnn.study.report import Report

webdriver = pytest.importorskip("selenium.webdriver", reason="pages are tested with selenium: pip install selenium")
pytest.importorskip("latex2mathml", reason="the equations need latex2mathml")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402 (where there is selenium)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
# As root, without a window, and without asking anybody for anything.
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        missing = "no Chromium and ChromeDriver here: Debian has both, apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("MINICNN_REQUIRE_BROWSER") == "1" else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report():
    return Report.of(subject())


@pytest.fixture(scope="module")
def file(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "a <page> & more.html"
    report.write(path)
    return path


@pytest.fixture
def page(browser, file):
    """The page, opened afresh; afterwards there must be nothing in the console."""
    look(browser, file)
    yield browser
    assert browser.get_log("browser") == []
    assert "taken" not in browser.title


def look(browser, file, width=1300, dark=False, at=""):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    browser.get(file.as_uri() + at)
    settle(browser)


def settle(page):
    """Until two frames are drawn: a busy machine may answer a script before it handles a key, or drop it before the first frame."""
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def position(page):
    return page.find_element(By.ID, "main").get_attribute("data-at")


def press(page, *keys):
    ActionChains(page).send_keys(*keys).perform()
    settle(page)


def go(page, place):
    page.execute_script("location.hash = arguments[0]", place)
    WebDriverWait(page, 20, poll_frequency=0.05).until(lambda page: position(page) == place)


def step_of(report, op):
    return next(s.number for s in report.tape.steps if s.op == op)


# ---------------------------------------------------------------- walking
def test_forward_then_backward_by_keys_buttons_and_clicks(page, report):
    n = len(report.tape.steps)
    walk = ["overview", *(f"forward-{i}" for i in range(n)), *(f"backward-{i}" for i in reversed(range(n)))]
    state = """const main = document.getElementById("main"), all = css => [...document.querySelectorAll(css)];
               const one = css => all(css).length === 1 && all(css)[0];
               return [main.dataset.at, one("#graph [aria-current] .op").textContent,
                       all("#graph .dot").indexOf(one("#graph .dot.lit")), main.querySelector("h2").textContent]"""
    assert position(page) == walk[0]
    for place in walk[1:]:
        press(page, Keys.ARROW_RIGHT)
        at, lit, dot, heading = page.execute_script(state)
        step = report.tape.steps[int(place.split("-")[1])]
        assert (at, lit, dot) == (place, step.op, step.number) and step.op in heading
    press(page, Keys.ARROW_RIGHT)                                   # there is nothing behind the last
    assert position(page) == "backward-0"
    press(page, Keys.ARROW_LEFT)
    assert position(page) == "backward-1" and page.find_element(By.ID, "position").text == f"backward {n - 1} of {n}"
    press(page, "b")
    assert position(page) == "forward-1"
    press(page, Keys.HOME)
    assert position(page) == "overview" and not page.find_element(By.ID, "previous").is_enabled()
    press(page, Keys.END)
    assert position(page) == "backward-0" and not page.find_element(By.ID, "next").is_enabled()
    page.find_element(By.ID, "match").click()
    assert position(page) == "forward-0"
    page.find_element(By.ID, "next").click()
    page.find_elements(By.CSS_SELECTOR, "#graph button")[4].click()
    assert position(page) == "forward-3"
    page.find_element(By.ID, "to-overview").click()
    assert position(page) == "overview"
    page.refresh()
    assert position(page) == "overview"
    go(page, "backward-2")
    page.refresh()
    assert position(page) == "backward-2"                           # the address remembers where one was


def test_both_sides_of_a_step_stand_side_by_side(page, report):
    go(page, f"backward-{step_of(report, 'conv2d')}")
    cells = page.execute_script("""
        const about = cell => [cell.getBoundingClientRect().x, cell.getBoundingClientRect().y, cell.classList.contains("now")];
        return ["forward", "backward"].map(side => [...document.querySelectorAll(`.cell.${side}`)].map(about))""")
    assert len(cells[0]) == len(cells[1]) > 4
    assert all(f[0] < b[0] and f[1] == b[1] and not f[2] and b[2] for f, b in zip(*cells, strict=True))
    text = page.find_element(By.ID, "main").text
    assert "def conv2d(" in text and "def conv2d_dx(" in text and "def conv2d_dweight(" in text and "ops/conv.py, line" in text
    assert len(page.find_elements(By.CSS_SELECTOR, ".cell.forward math")) == 1
    assert len(page.find_elements(By.CSS_SELECTOR, ".cell.backward math")) == 3
    assert "Kept for the backward" in text and "multiply-adds" in text and "x: 3 × 2 × 9 × 8" in text
    box = page.find_element(By.CSS_SELECTOR, ".cell.backward math").size
    assert box["height"] > 15 and box["width"] > 60                 # it is typeset, with subscripts below the line
    low, base = page.execute_script("""const [base, sub] = document.querySelector(".cell.backward msub").children;
                                       return [sub.getBoundingClientRect().bottom, base.getBoundingClientRect().bottom]""")
    assert low > base + 2
    assert HOSTILE.replace("\u2028\u2029", "") in text.replace("\n", "").replace("\u2028\u2029", "")


def test_the_overview(page, report):
    text = page.find_element(By.ID, "main").text
    assert "The gradient along the depth" in text and "without residual paths, without batch norm" in text
    assert len(page.find_elements(By.CSS_SELECTOR, ".chart path")) == 4
    for line in report.lines:
        times = line.norms[-1] / line.norms[0]
        assert f"times {'smaller' if times >= 1 else 'larger'} at the image" in text
    relu = report.tape.steps[step_of(report, "relu")].output.array
    assert f"{float(f'{100 * (relu == 0).mean():.2g}'):g} %; {int((relu == 0).all((0, 2, 3)).sum())} of 6 dead" in text
    page.find_element(By.CSS_SELECTOR, ".bars button").click()
    assert position(page) == f"forward-{step_of(report, 'relu')}"


def test_no_request_leaves_the_file(page):
    page.get_log("performance")
    page.refresh()
    press(page, *[Keys.ARROW_RIGHT] * 8)
    sent = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file://", "data:")) for url in asked)
    assert sum(url.startswith("file://") for url in asked) == 1


# ---------------------------------------------------------------- opened up
CLICK_EVERY_NUMBER = """
    const found = [], open = document.querySelector(".open");
    const tabs = [...open.querySelectorAll(":scope > .controls[role=group] button")];
    for (const tab of tabs.length ? tabs : [null]) {
      tab?.click();
      const selects = () => [...open.querySelectorAll("select")];
      for (let i = 0; i < selects()[0].options.length; i++) {
        selects()[0].selectedIndex = i;
        selects()[0].dispatchEvent(new Event("change"));
        const canvas = open.querySelector("canvas[role=application]"), box = canvas.getBoundingClientRect();
        const {rows, columns} = canvas.dataset, node = canvas.closest(".view, .open");
        for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
          delete node.dataset.sum;                        // a number that cannot be chosen leaves it so
          canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + (c + 0.5) / columns * box.width,
                                                        clientY: box.top + (r + 0.5) / rows * box.height}));
          const said = node.dataset.sum ?? node.dataset.winner;
          const {engine = "", part} = node.dataset;
          if (said !== undefined) found.push([tab ? tab.textContent : "", i, r, c, said, engine, part]);
        }
      }
    }
    return found;"""


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_every_sum_of_an_opened_convolution_is_what_the_engine_wrote(page, report, which):
    """One with padding, one with groups, one with stride, dilation and an oblong filter; each output, input pixel and weight."""
    step = [s for s in report.tape.steps if s.op == "conv2d"][which]
    opened = report.of_steps[step.number]["opened"]
    go(page, f"forward-{step.number}")
    found = page.execute_script(CLICK_EVERY_NUMBER)
    outputs, inputs, weights = ({tuple(at): (float(s), float(e)) for v, *at, s, e, _ in found if v.startswith(view)}
                                for view in ("An output", "An input", "A weight"))
    y, dx, x = step.output.array[0], step.input_grads["x"][0], step.inputs["x"].array
    top, left = opened["pixels"][:2]
    assert len(outputs) == len(opened["filters"]) * y[0].size and len(inputs) == len(opened["channels"]) * x[0, 0].size
    for (i, r, c), both in outputs.items():
        assert both == pytest.approx((y[opened["filters"][i], r, c],) * 2, rel=1e-4, abs=1e-5 * float(abs(y).max()))
    for (i, r, c), both in inputs.items():
        assert both == pytest.approx((dx[opened["channels"][i], r + top, c + left],) * 2, rel=1e-4, abs=1e-5 * float(abs(dx).max()))
    assert len(weights) >= step.inputs["weight"].array[0, 0].size
    for both in weights.values():
        assert both[0] == pytest.approx(both[1], rel=1e-4, abs=1e-5 * float(abs(step.input_grads["weight"]).max()))
    # And of it the part of the first image: what a pass of one image would have given; with the channel that is chosen first.
    settings = {name: step.options[name] for name in ("stride", "padding", "dilation", "groups")}
    of_first = mc.ops.conv2d_weight_grad(x[:1], step.grad[:1], step.inputs["weight"].shape[2:], **settings)
    for v, i, r, c, _, _, part in found:
        if v.startswith("A weight"):
            k = opened["filters"][i]
            channel = opened["channels"][0] - k // (len(of_first) // step.options["groups"]) * of_first.shape[1]     # in its group
            expected = of_first[k, channel, r, c]
            assert float(part) == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(abs(of_first).max()))


def test_batch_norm_in_three_terms(page, report):
    go(page, f"backward-{step_of(report, 'normalize')}")
    found = page.execute_script(CLICK_EVERY_NUMBER)
    sums, engine = np.array([(float(s), float(e)) for *_, s, e, _ in found]).T
    assert len(found) == 4 * 72 and np.allclose(sums, engine, rtol=1e-3, atol=1e-5 * np.abs(engine).max())


def test_who_won_a_pooling(page, report):
    step = report.tape.steps[step_of(report, "max_of_windows")]
    go(page, f"forward-{step.number}")
    found = page.execute_script(CLICK_EVERY_NUMBER)
    x, channels = step.inputs["x"].array[0], report.of_steps[step.number]["opened"]["channels"]
    for _, i, p, q, winner, *_ in found:
        window = {(r, c): x[channels[i], r, c] for r in range(2 * p - 1, 2 * p + 2) for c in range(2 * q - 1, 2 * q + 2)
                  if 0 <= r < 9 and 0 <= c < 8}
        assert winner == "{},{}".format(*max(window, key=window.get))          # of equal ones, max takes the first


def test_hover_and_arrow_keys_choose_a_pixel(page, report):
    go(page, f"forward-{step_of(report, 'conv2d')}")
    canvas = page.find_element(By.CSS_SELECTOR, ".open canvas[role=application]")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    sums = lambda: page.find_element(By.CSS_SELECTOR, ".open .sum").text            # noqa: E731
    before = sums()
    ActionChains(page).move_to_element_with_offset(canvas, -40, -50).perform()
    hovered = sums()
    assert hovered != before and "the engine wrote" in hovered and len(page.find_elements(By.CSS_SELECTOR, ".open .numbers")) == 6
    page.execute_script("arguments[0].focus({preventScroll: true})", canvas)
    label = canvas.get_attribute("aria-label")
    press(page, Keys.ARROW_RIGHT)
    assert sums() != hovered and canvas.get_attribute("aria-label") != label
    assert position(page) == f"forward-{step_of(report, 'conv2d')}"         # the page stays where it is


# ---------------------------------------------------------------- checked while you look
def test_a_number_of_a_gradient_beside_its_difference(page, report):
    step = step_of(report, "linear")
    go(page, f"backward-{step}")
    rows = page.find_elements(By.CSS_SELECTOR, ".checks tbody tr")
    recorded = report.of_steps[step]["checks"]["x"]
    assert len(rows) == len(recorded) == 24
    rows[3].click()
    said = page.find_element(By.CSS_SELECTOR, ".chosen").text
    assert f"[{recorded[3][0][0]}, {recorded[3][0][1]}]" in said and "ahead and back" in said and "relative error" in said
    number = float(said.split("as if it were ")[1].split(":")[0].replace("−", "-"))
    assert number == pytest.approx(recorded[3][3], rel=1e-6)
    press(page, Keys.ARROW_DOWN)
    assert rows[4].get_attribute("aria-selected") == "true" and page.find_element(By.CSS_SELECTOR, ".chosen").text != said
    page.find_elements(By.CSS_SELECTOR, ".checked [role=group] button")[1].click()
    assert "gradient of weight at" in page.find_element(By.CSS_SELECTOR, ".chosen").text
    assert "All 60 agree" in page.find_element(By.CSS_SELECTOR, ".checked").text


def test_a_kink_says_so(page, report):
    step = step_of(report, "max_of_windows")
    if not any(row[7] for row in report.of_steps[step]["checks"]["x"]):
        pytest.fail("no sampled number of the pooling sits on a kink, so the page cannot be asked")
    go(page, f"backward-{step}")
    assert "sit on a kink" in page.find_element(By.CSS_SELECTOR, ".checked").text
    next(row for row in page.find_elements(By.CSS_SELECTOR, ".checks tbody tr") if "kink" in row.text).click()
    assert "It sits on a kink: moved back the slope is" in page.find_element(By.CSS_SELECTOR, ".chosen").text


# ---------------------------------------------------------------- any screen, and no mouse
@pytest.mark.parametrize("dark", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_phone_in_light_and_dark(page, file, report, dark):
    look(page, file, width=390, dark=dark)
    for place in ["overview", *(f"forward-{step_of(report, op)}" for op in ("conv2d", "normalize", "max_of_windows", "linear"))]:
        go(page, place)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390, place
    ground, ink = page.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    light = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (ground, ink)]
    assert (light[0] < 60 and light[1] > 200) if dark else (light[0] > 240 and light[1] < 60)
    corner = "return [...document.querySelector('.plane canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    assert len(page.execute_script(corner)) == 4


def test_the_keyboard_alone_reaches_everything(page, report):
    go(page, f"forward-{step_of(report, 'conv2d')}")
    page.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        press(page, Keys.TAB)
        here = page.execute_script("const e = document.activeElement; return e === document.body ? 'body' : e.id || "
                                   "e.closest('#graph') && 'graph' || e.getAttribute('role') || e.tagName")
        if here == "body":
            break
        reached.append(here)
        visible = page.execute_script("const s = getComputedStyle(document.activeElement); return s.outlineStyle !== 'none'")
        assert visible, here
    for wanted in ("to-overview", "previous", "slider", "next", "match", "graph", "PRE", "application", "SELECT", "TR"):
        assert wanted in reached, (wanted, reached)
    assert reached.count("graph") == 1                              # the list is one stop; inside it the arrows go up and down
    page.execute_script("document.querySelector('#graph [tabindex=\"0\"]').focus()")
    press(page, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    assert position(page) == f"forward-{step_of(report, 'conv2d') + 2}"


# ---------------------------------------------------------------- the real ones
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_a_whole_model(browser, tmp_path, monkeypatch, name):
    """Every step of it drawn, without an error and without scrolling sideways; a VGG-16 at 224 x 224 in less than 15 MB."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from minicnn.study.report import run
    monkeypatch.chdir(tmp_path)
    path, _, report = run(name)
    assert path.stat().st_size < 15e6 and report.wrong == 0
    look(browser, path.resolve())
    n = len(report.tape.steps)
    for place in (*(f"forward-{i}" for i in range(n)), *(f"backward-{i}" for i in reversed(range(n)))):
        at, width = browser.execute_script("""document.getElementById("next").click();
            return [document.getElementById("main").dataset.at, document.documentElement.scrollWidth]""")
        assert at == place and width <= 1300
    assert not browser.find_element(By.ID, "next").is_enabled() and browser.get_log("browser") == []
