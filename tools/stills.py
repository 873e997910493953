"""Take the pictures that the site shows where scripts are off: docs/figures/still/*.png, from the built site.

python tools/stills.py site      after `make site`, when a figure has changed; needs a Chromium (CHROMIUM=path)
"""

import functools
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures" / "still"


def main() -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, reduced_motion="reduce")
        page.goto(f"http://127.0.0.1:{server.server_port}/ten_minutes/", wait_until="networkidle")
        for place in page.locator("[data-figure]").all():
            place.screenshot(path=FOLDER / f"{place.get_attribute('data-figure')}.png")
        page.goto(f"http://127.0.0.1:{server.server_port}/", wait_until="networkidle")
        page.locator(".sbs-panels").screenshot(path=FOLDER / "sideBySide.png")
    server.shutdown()


if __name__ == "__main__":
    main()
