"""The picture of the page in the README, examples/page.webp: `make test-page` installs what it needs.

    python examples/screenshot.py

Runs `openvla serve --sim`, asks for the action of an example and for an episode, and takes the page down to the robots.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


FOLDER = Path(__file__).resolve().parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WORDS, TASK = "open the door", "door-open-v3"
WIDTH = 1120


def main() -> None:
    command = [str(Path(sys.executable).with_name("openvla")), "serve", "--sim", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
            page.goto(address)
            page.locator(".example", has_text=WORDS).first.click()
            for _ in range(4):  # the time of the last is shown
                page.locator("#waiting", has_text="answered in").wait_for(timeout=60_000)
                page.click("#act")
            page.locator("#waiting", has_text="answered in").wait_for(timeout=60_000)
            page.select_option("#task", TASK)
            page.click("#start")
            page.locator("#episode-words.done").wait_for(timeout=300_000)
            page.evaluate("scrollTo(0, 0)")
            height = page.locator("section[aria-label=Robots]").bounding_box()["y"]
            picture = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height - 4})
            browser.close()
    finally:
        server.terminate()
        server.wait(60)
    Image.open(io.BytesIO(picture)).convert("RGB").save(FOLDER / "page.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
