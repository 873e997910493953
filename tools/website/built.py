"""The built site as the tests see it: its pages, a server for it, and a browser's tab with the network cut.

WEBSITE=DIR    the built site (default: site/)        CHROMIUM=PATH      the browser (default: found on the PATH)
PATIENCE=N     times as long as usual to wait for a page, on a machine that is busy with something else
"""

import http.server
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = Path(os.environ.get("WEBSITE", ROOT / "site"))
PATIENCE = float(os.environ.get("PATIENCE", "1"))
FILMS = sorted(path.stem for path in (ROOT / "docs" / "traces").glob("*.json"))
TRACES = [name for name in FILMS if name not in ("fragmentation", "paged_attention")]  # those of whole runs
PAGES = sorted(path.relative_to(SITE).as_posix().removesuffix("index.html") for path in SITE.rglob("*.html"))
KINDS = [  # one of each kind of page, and those with a shape of their own
    "",
    "ten_minutes/",
    "setup/",
    "course/",
    "course/ch04/",
    "course/ch06/",
    "course/ch07/",
    "course/ch08/",
    "course/ch10/",
    "playground/",
    "exercises/",
    "museum/",
    "museum/ch09_fork_without_a_reference/",
    "paper/",
    "then_and_now/",
    "measured/",
    "mutation/",
    "tensor_parallel/",
    "reference/",
    "reference/memory/",
    "design/",
    "wild/",
    "glossary/",
    "teachers/",
    "404.html",
]
RUNS_PLAYGROUND = (SITE / "playground" / "manifest.json").is_file()

for folder in (HERE, ROOT / "docs" / "playground"):  # the modules of the build, and the playground's Python
    sys.path.insert(0, str(folder))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Watched:
    """A tab with the network cut. `problems` grows by every request that leaves, every error, every missing file."""

    def __init__(self, browser, base, width=1280, scheme="light", ratio=1):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=ratio
        )
        self.page, self.base, self.problems, self.sizes = self.context.new_page(), base, [], {}
        self.context.route("**/*", self._route)
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("response", self._response)
        self.page.set_default_timeout(30_000 * PATIENCE)

    def _route(self, route):
        if route.request.url.startswith((self.base, "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"a request left the site: {route.request.url}")
            route.abort()

    def _response(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")
        self.sizes[response.url.removeprefix(self.base)] = int(response.headers.get("content-length", 0))

    def open(self, path):
        self.page.goto(self.base + path, wait_until="commit")
        return self.settled()

    def settled(self):
        """Wait until all is there: on a slow machine the network can rest before the page is read to its end."""
        self.page.wait_for_load_state("load")
        self.page.wait_for_load_state("networkidle")
        return self.page
