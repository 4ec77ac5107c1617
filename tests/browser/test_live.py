"""The live page as a process, before a real tritonserver, in a real headless Chromium."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from playwright.sync_api import expect

from docs.screenshots import DESKTOP, PHONE
from panotriton.client.client import Client
from panotriton.pipeline.results import Group
from panotriton.server.launch import LocalServer

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
FILES = (PANORAMAS / "courtyard.jpg", PANORAMAS / "interior.jpg")
TYPE = {"Content-Type": "application/octet-stream"}
BETWEEN, SEED, VISITORS = 2, 7, 2
LONG = 200  # in-between views that take a minute at least
WAIT_MS = 60_000


class Page:
    """A `panotriton live` process."""

    def __init__(self, server: str, *more: str) -> None:
        options = ["--url", server, "--port=0", "--crop-size=64", f"--visitors={VISITORS}"]
        command = [sys.executable, "-m", "panotriton", "live", *options, "--max-upload-mb=3", *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.process.stdout.readline().startswith("ready")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.process.returncode is None:
            self.stop()

    def stop(self) -> str:
        """End it as Ctrl-C does; returns the rest of what it says."""
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return said


@pytest.fixture(scope="module")
def live(standin: LocalServer) -> Iterator[Page]:
    with Page(standin.grpc_url) as running:
        yield running


@pytest.fixture(scope="module")
def group(standin: LocalServer) -> Group:
    """What the page must come to show."""
    with Client(standin.grpc_url) as client:
        return client.process(*FILES, seed=SEED, crop_size=64, interpolations=BETWEEN)


@pytest.fixture
def visit(browser: Any, live: Page) -> Iterator[Callable[..., Any]]:
    """Opens the page; in the end, none of its visits has complained or asked anyone else.

    What Chromium itself says of a run that was refused is no complaint of the page's.
    """
    opened, troubles = [], []

    def said(message: Any) -> None:
        if not re.fullmatch(r"Failed to load resource: .* status of 400 .*", message.text):
            troubles.append(message.text)

    def requested(request: Any) -> None:
        if not request.url.startswith(("data:", "blob:", live.url)):
            troubles.append(request.url)

    def open_page(**options: Any) -> Any:
        page = browser.new_page(**({"viewport": DESKTOP} | options))
        page.on("console", said)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", requested)
        page.goto(live.url)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert troubles == []


def begin(page: Any, files: tuple[Path, Path] = FILES, between: int = BETWEEN) -> None:
    for number, path in enumerate(files, start=1):
        page.set_input_files(f"input[name=panorama_{number}]", path)
    page.fill("input[name=seed]", str(SEED))
    page.fill("input[name=interpolations]", str(between))
    page.click("text=Start")


def test_two_panoramas_become_a_group(visit: Callable[..., Any], group: Group) -> None:
    page = visit()
    begin(page)
    state = page.locator("#state")
    expect(state).to_have_text(f"done: {len(group.kept)} of 8 intervals kept", timeout=WAIT_MS)
    done, total = re.findall(r"\d+", page.inner_text("#count"))[:2]
    assert done == total
    assert page.evaluate("document.querySelector('progress').position") == 1
    assert group.kept and len(group.kept) < 8
    for interval in range(1, 9):
        kind = "kept" if interval in group.kept else "dropped"
        card = page.locator(f"#interval-{interval}")
        expect(card.locator(".badge")).to_have_text(kind)
        expect(page.locator(f"tr[data-interval='{interval}'] .badge")).to_have_text(kind)
        assert card.locator(".player").count() == (2 if kind == "kept" else 0)
        if kind == "dropped":
            assert re.match(
                r"Dropped: panorama \d scores 0\.\d\d\.", card.locator(".reason").inner_text()
            )


def test_scores_descriptions_and_views_are_the_groups(
    visit: Callable[..., Any], group: Group
) -> None:
    page = visit()
    begin(page)
    expect(page.locator("#state")).to_have_text(re.compile("^done"), timeout=WAIT_MS)
    for pair in group.pairs:
        bar = page.locator(f"tr[data-interval='{pair.interval}'] .bar.p{pair.panorama} b")
        assert bar.inner_text() in (f"{pair.quality.final_score:.2f}", "")  # "": spared
    for interval in group.intervals:
        card = page.locator(f"#interval-{interval.interval}")
        assert card.locator("blockquote").inner_text() == interval.description
        for p, sequence in enumerate(interval.sequences):
            views = card.locator(".player").nth(p).locator(".strip button")
            names = [view.get_attribute("data-name") for view in views.all()]
            assert names == ["left", "in-between 1", "in-between 2", "right"]
            yaws = [view.get_attribute("data-yaw") for view in views.all()]
            expected = [f"{camera.yaw:.1f}°".replace("-", "−") for camera in sequence.cameras]
            assert yaws == expected
            assert card.locator(".player").nth(p).locator(".betweens path").count() == BETWEEN


def test_the_player_and_the_slider_work_by_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    begin(page)
    expect(page.locator("#state")).to_have_text(re.compile("^done"), timeout=WAIT_MS)
    player = page.locator(".player").first
    player.focus()
    for key, expected in (("ArrowRight", "2/4 in-between 1"), ("End", "4/4 right")):
        page.keyboard.press(key)
        assert player.locator("output").inner_text() == expected
    slider = page.locator("img-comparison-slider").first
    assert slider.get_attribute("aria-valuenow") == "50"
    slider.focus()
    page.keyboard.press("ArrowLeft", delay=100)
    assert int(slider.get_attribute("aria-valuenow")) < 50


def test_a_second_run_begins_afresh(visit: Callable[..., Any], group: Group) -> None:
    page = visit()
    for _ in range(2):
        begin(page)
        expect(page.locator("#state")).to_have_text(re.compile("^done"), timeout=WAIT_MS)
        assert page.locator(".player").count() == 2 * len(group.kept)


@pytest.mark.parametrize(
    "screen",
    [
        {"viewport": PHONE, "is_mobile": True, "has_touch": True},
        {"color_scheme": "dark", "viewport": {"width": 320, "height": 640}},
    ],
    ids=["phone", "narrow and dark"],
)
def test_it_fits_small_screens(visit: Callable[..., Any], screen: dict[str, Any]) -> None:
    page = visit(**screen)
    begin(page)
    expect(page.locator("#state")).to_have_text(re.compile("^done"), timeout=WAIT_MS)
    width, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= room, "the page scrolls sideways"


def images(standin: LocalServer) -> int:
    with Client(standin.grpc_url) as client:
        return client.statistics("osediff_vae_decoder")["osediff_vae_decoder"].requests


def assert_work_ends(standin: LocalServer) -> None:
    """Within a second no more images are made."""
    time.sleep(1)
    before = images(standin)
    time.sleep(2)
    assert images(standin) == before


def test_cancel_ends_the_work_at_the_server(
    visit: Callable[..., Any], standin: LocalServer
) -> None:
    page = visit()
    begin(page, between=LONG)
    page.locator(".interval .pair").first.wait_for(timeout=WAIT_MS)
    page.click("text=Cancel")
    expect(page.locator("#state")).to_have_text("cancelled")
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("text=Start")).to_be_visible()
    assert_work_ends(standin)


def test_leaving_ends_the_work_at_the_server(
    visit: Callable[..., Any], standin: LocalServer
) -> None:
    page = visit()
    begin(page, between=LONG)
    page.locator(".interval .pair").first.wait_for(timeout=WAIT_MS)
    page.goto("about:blank")
    assert_work_ends(standin)


def test_a_file_that_is_no_image_is_told_by_its_place(
    visit: Callable[..., Any], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    page = visit()
    begin(page, (FILES[0], broken))
    expect(page.locator("#trouble")).to_contain_text("panorama 2 holds 8 bytes that are no image")
    expect(page.locator("#state")).to_have_text("failed")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(FILES[0].read_bytes()[:5000])
    begin(page, (cut, FILES[1]))
    expect(page.locator("#trouble")).to_contain_text("panorama 1 is a broken image")
    begin(page)
    expect(page.locator("#state")).to_have_text(re.compile("^done"), timeout=WAIT_MS)
    expect(page.locator("#trouble")).to_be_hidden()


def test_files_that_are_missing_or_too_large_are_told_before_they_are_sent(
    visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit()
    page.click("text=Start")
    expect(page.locator("#trouble")).to_have_text("Choose two panoramas first.")
    large = tmp_path / "large.jpg"
    large.write_bytes(FILES[0].read_bytes() + bytes(4_000_000))
    begin(page, (large, FILES[1]))
    expect(page.locator("#trouble")).to_contain_text("at most 3.1 MB are taken")


@contextlib.contextmanager
def asked(page: Page, body: Any, headers: dict[str, str] = TYPE, **query: Any) -> Iterator[Any]:
    """The response to a run; leaving the block leaves the run."""
    connection = http.client.HTTPConnection(urlsplit(page.url).netloc, timeout=30)
    options = {"first_bytes": FILES[0].stat().st_size, "interpolations": 0} | query
    with contextlib.closing(connection):
        connection.request("POST", f"/runs?{urlencode(options)}", body, headers)
        with connection.getresponse() as response:
            yield response


def refusal(page: Page, body: Any, headers: dict[str, str] = TYPE, **query: Any) -> Any:
    """Status and message."""
    with asked(page, body, headers, **query) as response:
        return response.status, json.loads(response.read())["error"]


def both() -> bytes:
    return b"".join(path.read_bytes() for path in FILES)


def test_bad_requests_are_refused_by_name(live: Page) -> None:
    body = both()
    for status, words, query in (
        (400, "first_bytes is 0 of", {"first_bytes": 0}),
        (400, f"first_bytes is {len(body)} of {len(body)}", {"first_bytes": len(body)}),
        (400, "panorama 2 holds", {"first_bytes": 5000}),
        (400, "seed is -1; expected 0", {"seed": -1}),
        (400, "threshold is 2.0; expected 0 to 1", {"threshold": 2}),
        (400, "interpolations: Input should be a valid integer", {"interpolations": "x"}),
    ):
        got, message = refusal(live, body, **query)
        assert (got, words in message) == (status, True), message
    too_large = body + bytes(3 << 20)
    got, message = refusal(live, b"", TYPE | {"Content-Length": str(len(too_large))})
    assert (got, "expected at most 3.1" in message) == (413, True), message
    got, message = refusal(live, iter([body]))  # of unknown length: sent in chunks
    assert (got, "expected Content-Length" in message) == (411, True), message


def test_other_sites_cannot_use_the_page(live: Page) -> None:
    """What a browser sends for a foreign page without asking first is refused, and a foreign name."""
    assert refusal(live, both(), {"Content-Type": "text/plain"})[0] == 415
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Host": "example.com"})
        with connection.getresponse() as response:
            assert response.status == 400


def test_visitors_are_bounded(live: Page, standin: LocalServer) -> None:
    with contextlib.ExitStack() as others, asked(live, both(), interpolations=LONG) as first:
        held = [
            others.enter_context(asked(live, both(), interpolations=LONG))
            for _ in range(VISITORS - 1)
        ]
        assert [response.status for response in (first, *held)] == [200] * VISITORS
        status, message = refusal(live, both())
        assert (status, "2 runs are at work" in message) == (503, True), message
        others.close()
        assert_place_comes_free(live)
    assert_work_ends(standin)


def assert_place_comes_free(page: Page) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with asked(page, both()) as response:
            if response.status == 200:
                last = json.loads(response.read().splitlines()[-1])
                assert last["event"] == "done"
                return
        time.sleep(0.2)
    pytest.fail("ten seconds after a visitor has left his place is still taken")


def test_no_server_is_one_clear_error(browser: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{unused.getsockname()[1]}"
    with Page(server) as running:
        page = browser.new_page()
        page.goto(running.url)
        begin(page)
        expect(page.locator("#trouble")).to_contain_text(
            f"no server answers over grpc at {server}", timeout=WAIT_MS
        )
        page.close()


def test_ctrl_c_ends_page_and_work(standin: LocalServer) -> None:
    with Page(standin.grpc_url) as running, asked(running, both(), interpolations=LONG):
        began = time.monotonic()
        assert running.stop() == "stopped\n"
        assert time.monotonic() - began < 10
    assert_work_ends(standin)
