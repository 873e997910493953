"""What the tests of the site share. Without a browser those that need one are skipped, and say so."""

import functools
import http.server
import os
import shutil
import threading

import pytest
from built import SITE, Quiet, Watched


@pytest.fixture(scope="session")
def base():
    """The address of the site, served from this machine."""
    assert (SITE / "index.html").is_file(), f"{SITE} holds no site: make site"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `site-test` brings playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH (CHROMIUM=PATH names another)")
    with playwright.sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def opened(browser, base):
    """Open a page of the site. Whatever went wrong on it, to the end of the test, fails the test."""
    made = []

    def open_page(path, **options):
        watched = Watched(browser, base, **options)
        made.append(watched)
        watched.open(path)
        return watched.page

    yield open_page
    for watched in made:
        watched.context.close()
    assert [problem for watched in made for problem in watched.problems] == []


@pytest.fixture
def player(opened):
    """Home, with its player showing a trace of docs/traces/ from the beginning."""

    def show(name, **options):
        page = opened("", **options)
        page.evaluate(
            """async (name) => {
                const player = document.querySelector('trace-player');
                await player.open(`traces/${name}.json`);
                player.go(0);
            }""",
            name,
        )
        return page

    return show
