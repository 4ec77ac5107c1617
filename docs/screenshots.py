"""Take the pictures of the report that the documentation shows, in headless Chromium.

python docs/screenshots.py                          from out/demo/group_0001, as `make demo` leaves it
python docs/screenshots.py GROUP --output FOLDER    from another group

Writes report.jpg, report-dark.jpg and report-phone.jpg. Needs `pip install playwright` and a Chromium
(Debian: apt-get install chromium); playwright's own download works as well.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from panotriton.report import write_report

ROOT = Path(__file__).parent.parent
QUALITY = 88
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


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


def shoot(page, path, **options):
    """Wait until every picture that is in view is decoded, then save a JPEG."""
    page.evaluate("Promise.all([...document.images].filter(i => i.src).map(i => i.decode()))")
    page.screenshot(path=path, type="jpeg", quality=QUALITY, **options)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


def opened(browser, report, **options):
    """A page of its own with the report."""
    page = browser.new_page(**options)
    page.goto(report.as_uri())
    return page


def take(browser, report, folder):
    """The top on a desktop, a sequence in the dark, the top on a phone."""
    shoot(opened(browser, report, viewport=DESKTOP), folder / "report.jpg")
    page = opened(browser, report, viewport=DESKTOP, color_scheme="dark")
    player = page.locator(".player").first
    if player.count():
        for _ in range(5):
            player.press("ArrowRight")
        player.evaluate("element => { element.blur(); element.scrollIntoView({block: 'end'}); }")
    shoot(page, folder / "report-dark.jpg")
    phone = opened(browser, report, viewport=PHONE, device_scale_factor=2, is_mobile=True)
    shoot(phone, folder / "report-phone.jpg")


def main():
    """Write the report to a temporary folder, photograph it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", type=Path, default=ROOT / "out/demo/group_0001")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, chromium(installed()) as browser:
        take(browser, write_report(options.group, Path(scratch) / "report.html"), options.output)


if __name__ == "__main__":
    main()
