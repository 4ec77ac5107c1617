"""Take the pictures of the report and the live page that the documentation shows, in headless Chromium.

python docs/screenshots.py                          of the newest group that `make demo` has left in out/demo
python docs/screenshots.py GROUP --output FOLDER    of another group

Writes report_light.webp, report_dark.webp, report_phone.webp and live.webp. The last is taken in the middle
of a run with the group's panoramas and seed, on a server of its own from `repository`, as `make demo` builds
it; --no-live leaves it out. Needs `pip install playwright` and a Chromium (Debian: apt-get install chromium);
playwright's own download works as well.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from panotriton.groups import layout
from panotriton.groups.report import write_report
from panotriton.groups.report.record import read_record

ROOT = Path(__file__).parent.parent
QUALITY = 82
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
WAIT_MS = 600_000


@contextlib.contextmanager
def chromium(executable=None):
    """A headless browser: `executable`, or else the one that playwright has downloaded."""
    # Chromium's sandbox refuses to run as root, as in most containers.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def installed():
    """The system's Chromium or Chrome; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def shoot(page, path):
    """Wait until every picture is decoded, then save what is in view as WebP."""
    page.evaluate("Promise.all([...document.images].filter(i => i.src).map(i => i.decode()))")
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(path, quality=QUALITY, method=6)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


def opened(browser, url, **options):
    """A page of its own, which jumps where it would scroll smoothly."""
    page = browser.new_page(reduced_motion="reduce", **options)
    page.goto(url)
    return page


def take_report(browser, url, folder):
    """The top on a desktop, a sequence in the dark, the top on a phone."""
    shoot(opened(browser, url, viewport=DESKTOP), folder / "report_light.webp")
    page = opened(browser, url, viewport=DESKTOP, color_scheme="dark")
    player = page.locator(".player").first
    if player.count():
        for _ in range(5):
            player.press("ArrowRight")
        player.evaluate("element => { element.blur(); element.scrollIntoView({block: 'end'}); }")
    shoot(page, folder / "report_dark.webp")
    phone = opened(browser, url, viewport=PHONE, device_scale_factor=2, is_mobile=True)
    shoot(phone, folder / "report_phone.webp")


@contextlib.contextmanager
def live_page():
    """The address of a live page with a server of its own."""
    command = [sys.executable, "-m", "panotriton", "live", "--local", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield next(line.strip() for line in process.stdout if "http://" in line)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def take_live(browser, url, record, folder):
    """The first kept interval while its sequences fill."""
    page = opened(browser, url, viewport={"width": 1280, "height": 1000})
    for number, path in enumerate(record.panoramas, start=1):
        page.set_input_files(f"input[name=panorama_{number}]", ROOT / path)
    page.fill("input[name=seed]", str(record.options["seed"]))
    page.click("text=Start")
    views = page.locator(".strip button", has=page.get_by_alt_text(re.compile("in-between [5-9]")))
    views.first.wait_for(timeout=WAIT_MS)
    player = page.locator(".player", has=views).first
    for _ in range(3):
        player.press("ArrowRight")
    player.evaluate("element => { element.blur(); element.closest('.interval').scrollIntoView(); }")
    shoot(page, folder / "live.webp")


def newest():
    """The last group of the demo."""
    groups = layout.group_folders(ROOT / "out" / "demo")
    if not groups:
        sys.exit("no group in out/demo: run `make demo`, or name a group")
    return groups[-1]


def main():
    """Write the report to a temporary folder, photograph it and the live page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--no-live", action="store_true", help="the report alone")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    group = options.group or newest()
    with tempfile.TemporaryDirectory() as scratch, chromium(installed()) as browser:
        report = write_report(group, Path(scratch) / layout.REPORT)
        take_report(browser, report.as_uri(), options.output)
        if not options.no_live:
            with live_page() as url:
                take_live(browser, url, read_record(group), options.output)


if __name__ == "__main__":
    main()
