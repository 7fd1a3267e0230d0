"""The page in a real browser: it shows all sections, throws no error, and reacts.

`pytest -m browser` runs these alone.  They are skipped where there is no chromium with its
chromedriver, or no selenium.  Debian: apt-get install chromium chromium-driver.
"""

import json
import shutil
from pathlib import Path

import pytest

import report
import train_c2i
import train_t2i

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium, no chromedriver")]
QUICK = ["--preset", "toy", "--steps", "8", "--prompts-per-step", "2", "--group-size", "4",
         "--eval-images", "24", "--progress-every", "4", "--lr", "0.002"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A toy run of each task, and the page that compares them with another: {name: page}."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.progress.SHARE", 100)             # so that no picture is left out
        patch.setattr("harness.evidence.SECONDS", 1000)
        train_c2i.main([*QUICK, "--out", str(folder / "c2i")])
        train_t2i.main([*QUICK, "--out", str(folder / "t2i")])
    other = Path(shutil.copytree(folder / "c2i", folder / "other"))
    config = json.loads((other / "config.json").read_text())
    config["settings"]["seed"] = 5
    (other / "config.json").write_text(json.dumps(config))
    report.main([str(folder / "c2i"), str(other), "--out", str(folder / "both.html")])
    return {"c2i": folder / "c2i" / "report.html", "t2i": folder / "t2i" / "report.html",
            "comparison": folder / "both.html"}


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000",
                     "--host-resolver-rules=MAP * ~NOTFOUND"):   # no network
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(params=["c2i", "t2i", "comparison"])
def opened(request, runs, driver):
    """A page in the browser: (its kind, the browser)."""
    driver.get(f"file://{runs[request.param]}")
    yield request.param, driver
    assert driver.get_log("browser") == [], "the console has messages"


def sizes_of(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        ".map(box => [box.width, box.height])", selector)


def click(driver, selector, number=0):
    """Clicks on one of the elements that the selector means, as the page's own script sees it."""
    driver.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()",
                          selector, number)


def style(driver, selector, name):
    return driver.execute_script("return getComputedStyle(document.querySelector(arguments[0]))"
                                 ".getPropertyValue(arguments[1])", selector, name)


def slide(driver, selector, value):
    driver.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('input'))", selector, value)


def test_every_section_is_there_and_fits_the_width(opened):
    kind, driver = opened
    sections = ["run", "doctor", "pictures", "curves"] + ["minds"] * (kind != "comparison")
    for section in sections:
        (width, height), = sizes_of(driver, f"section#{section}")
        assert width > 800 and height > 80, section
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 1280
    assert all(width > 300 and height > 100 for width, height in sizes_of(driver, "svg"))
    loaded = driver.execute_script("return [...document.images].every(i => i.naturalWidth > 0)")
    assert loaded, "a picture is broken"


def test_the_slider_and_a_click_change_a_pair(opened):
    kind, driver = opened
    if kind == "comparison":
        pytest.skip("a comparison has no pairs")
    after = ".pair img + img"
    assert style(driver, after, "clip-path") == "inset(0px 0% 0px 0px)"
    slide(driver, ".card input", 25)
    assert style(driver, after, "clip-path") == "inset(0px 75% 0px 0px)"
    click(driver, ".pair")
    assert style(driver, after, "clip-path") == "inset(0px 0% 0px 0px)"
    click(driver, ".pair")
    assert style(driver, after, "clip-path") == "inset(0px 100% 0px 0px)"
    click(driver, "#all-after")
    assert style(driver, after, "clip-path") == "inset(0px 0% 0px 0px)"


def test_progress_can_be_moved_through(opened):
    kind, driver = opened
    if kind == "comparison":
        pytest.skip("a comparison has no progress")
    source = "return document.querySelector('#frame').src"
    last = driver.execute_script(source)
    slide(driver, "#progress", 0)
    assert driver.execute_script(source) != last
    slide(driver, "#progress", 2)
    assert driver.execute_script(source) == last


def test_a_click_on_a_patch_shows_the_codes_of_both_policies(opened):
    kind, driver = opened
    if kind == "comparison":
        pytest.skip("a comparison has no closer look")
    text = "return document.querySelector('#detail').textContent"
    assert len(sizes_of(driver, "#cells button")) == 36
    click(driver, "#cells button", 35)
    assert "Row 6, column 6" in driver.execute_script(text)
    click(driver, "#cells button", 7)
    assert "Row 2, column 2" in driver.execute_script(text)
    painted = sizes_of(driver, "#detail .painted")
    assert len(painted) == 10 and all(width > 90 and height > 90 for width, height in painted)
    assert style(driver, "#detail .painted", "background-image").startswith('url("data:image/png')
    assert len(sizes_of(driver, "#cells button.on")) == 1


def test_the_layers_and_the_pictures_can_be_chosen(opened):
    kind, driver = opened
    if kind == "comparison":
        pytest.skip("a comparison has no closer look")
    colours = ("return [...document.querySelectorAll('#cells button')].map(e => "
               "e.style.background).join()")
    seen = set()
    for layer in range(4):
        click(driver, "#layer button", layer)
        seen.add(driver.execute_script(colours))
    assert len(seen) == 4, "every layer has colours of its own"
    source = "return document.querySelector('#grid img').src"
    first = driver.execute_script(source)
    click(driver, "#which button", 1)
    assert driver.execute_script(source) != first
