"""The report in a real headless Chromium, opened from disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from docs.screenshots import DESKTOP, PHONE
from panotriton.groups.report import write_index, write_report
from tests.groups import write_example

NAN = float("nan")
SCORES = [0.9, 0.5, 0.9, NAN, 0.9, 0.9, 0.6, 0.9, 0.8, 0.9, 0.9, NAN, 0.9, 0.8, 0.9, 0.71]
SCREENS = {
    "desktop": {"viewport": DESKTOP},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True},
    "narrow": {"viewport": {"width": 320, "height": 640}},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("out")
    full = write_report(write_example(root, SCORES, [1, 8]))
    empty = write_report(write_example(root, [0.3] * 16, [], group_id=2))
    return {"full": full, "empty": empty, "index": write_index(root)}


class Visit:
    """A page that has noted every console message, error and request since it was opened."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.troubles: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, path))
        self.page.goto(path.as_uri())

    def _check(self, url: str, path: Path) -> None:
        if not url.startswith("data:") and url.partition("#")[0] != path.as_uri():
            self.troubles.append(f"request of {url}")


@pytest.fixture
def visit(browser: Any, reports: dict[str, Path]) -> Iterator[Visit]:
    opened = Visit(browser, reports["full"], viewport=DESKTOP)
    yield opened
    opened.page.close()
    assert opened.troubles == []


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("report", ["full", "empty", "index"])
def test_it_opens_without_complaint_or_request(
    browser: Any, reports: dict[str, Path], report: str, screen: str
) -> None:
    opened = Visit(browser, reports[report], **SCREENS[screen])
    page = opened.page
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    page.mouse.wheel(0, 100_000)
    page.evaluate("Promise.all([...document.images].filter(i => i.src).map(i => i.decode()))")
    width, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    page.close()
    assert opened.troubles == []
    assert width <= room, "the page scrolls sideways"


def test_the_slider_moves_by_keyboard(visit: Visit) -> None:
    slider = visit.page.locator("img-comparison-slider").first
    assert slider.get_attribute("role") == "slider"
    assert slider.get_attribute("aria-valuenow") == "25"
    slider.focus()
    visit.page.keyboard.down("ArrowRight")
    expect(slider).to_have_attribute("aria-valuenow", re.compile("[4-9][0-9]|100"))
    visit.page.keyboard.up("ArrowRight")
    reached = slider.evaluate("element => element.value")
    visit.page.keyboard.press("ArrowLeft", delay=100)
    assert slider.evaluate("element => element.value") < reached


def test_the_slider_is_reached_with_the_tab_key(visit: Visit) -> None:
    for _ in range(12):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("document.activeElement.tagName") == "IMG-COMPARISON-SLIDER":
            return
    pytest.fail("twelve tabs from the top have not reached the slider")


def test_one_to_one_shows_the_pair_at_its_own_size(visit: Visit) -> None:
    zoom = visit.page.locator(".interval .zoom").first
    natural = visit.page.locator(".interval img-comparison-slider img").first.evaluate(
        "element => element.naturalWidth"
    )
    zoom.press("Enter")
    assert zoom.get_attribute("aria-pressed") == "true"
    slider = visit.page.locator(".interval img-comparison-slider").first
    assert slider.evaluate("element => element.offsetWidth") == natural


def shown(player: Any) -> str:
    """What the player says and shows, which must be the same view."""
    text = player.locator("output").inner_text()
    current = player.locator('.strip [aria-current="true"] img')
    assert current.get_attribute("src") == player.locator(".screen").get_attribute("src")
    area = player.locator('.strip [aria-current="true"]').get_attribute("data-area")
    assert player.locator(".spot").get_attribute("d") == area
    return str(text)


def test_the_player_steps_by_arrow_keys(visit: Visit) -> None:
    player = visit.page.locator(".player").first
    player.focus()
    assert shown(player) == "1/11 left"
    for key, expected in (
        ("ArrowRight", "2/11 in-between 1"),
        ("ArrowRight", "3/11 in-between 2"),
        ("ArrowLeft", "2/11 in-between 1"),
        ("End", "11/11 right"),
        ("ArrowRight", "11/11 right"),
        ("Home", "1/11 left"),
        ("ArrowLeft", "1/11 left"),
    ):
        visit.page.keyboard.press(key)
        assert shown(player) == expected
    player.locator("input").focus()
    visit.page.keyboard.press("ArrowRight")
    assert shown(player) == "2/11 in-between 1"


def test_the_player_plays_there_and_back_and_pauses(visit: Visit) -> None:
    player = visit.page.locator(".player").first
    player.focus()
    visit.page.keyboard.press("End")
    visit.page.keyboard.press("Space")
    assert player.locator(".play").get_attribute("aria-label") == "Pause"
    expect(player.locator("output")).not_to_have_text(re.compile("^11/"))  # it turns back
    visit.page.keyboard.press("Space")
    assert player.locator(".play").get_attribute("aria-label") == "Play"
    paused = shown(player)
    visit.page.wait_for_timeout(400)
    assert shown(player) == paused


def test_a_thumbnail_leads_into_a_closed_interval(visit: Visit) -> None:
    inside = visit.page.locator("#pair-1-2 .compare")
    assert not inside.is_visible()
    visit.page.locator('.sheet a[href="#pair-1-2"]').press("Enter")
    inside.wait_for(state="visible")


def test_every_control_has_a_name(visit: Visit) -> None:
    nameless = visit.page.evaluate("""() =>
        [...document.querySelectorAll("button, input, a[href], summary, [tabindex='0'], [role]")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim()
                || [...e.querySelectorAll("img")].some((i) => i.alt)))
            .map((e) => e.outerHTML.slice(0, 200))""")
    assert nameless == []
    assert visit.page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(
    browser: Any, reports: dict[str, Path], scheme: str
) -> None:
    """WCAG AA: 4.5 to 1 between the page's text colours and the grounds they stand on."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(reports["full"].as_uri())
    colours = page.evaluate("""() => {
        const style = getComputedStyle(document.documentElement);
        const names = ["ink", "quiet", "kept", "dropped", "failed", "p1", "p2", "ground", "surface"];
        return Object.fromEntries(names.map((n) => [n, style.getPropertyValue("--" + n).trim()]));
    }""")
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert body == ("rgb(17, 19, 22)" if scheme == "dark" else "rgb(247, 246, 242)")
    for ground in (colours.pop("ground"), colours.pop("surface")):
        weak = {name: value for name, value in colours.items() if contrast(value, ground) < 4.5}
        assert weak == {}


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two #rrggbb colours."""
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
