"""Look at the built site in Chromium: requests to other hosts, pages wider than the screen, load times, and screenshots.

    mkdocs build -d site && pip install playwright && python tests/benchmarks/site.py site build/screenshots [PAGE ...]

Serves the folder on this machine and opens every page (or those whose address contains a PAGE) at desktop and phone width, in light and
dark. Takes the Chromium of the system (``chromium`` or ``google-chrome``). Exits with 1 if a page has a finding.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SLOWEST = 1.0  # seconds of a page
WIDER = """() => [...document.querySelectorAll('article *')].filter(e => {
  for (let p = e; p && p.tagName != 'ARTICLE'; p = p.parentElement)
    if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return false;
  return e.getBoundingClientRect().right > innerWidth + 1
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 40)).slice(0, 3)"""


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def serve(folder: Path) -> str:
    """Serve a folder until the process ends; return its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def findings(page: Any, address: str, seconds: float, asked: list[str]) -> Iterator[str]:
    """Yield what is wrong with an open page."""
    if outside := sorted({url.split("/")[2] for url in asked if not url.startswith((address, "data:", "blob:"))}):
        yield f"asks {', '.join(outside)}"
    if page.evaluate("document.documentElement.scrollWidth > innerWidth + 1"):
        yield "wider than the screen"
    if wide := page.evaluate(WIDER):
        yield f"cut at the right: {wide}"
    if broken := page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"):
        yield f"pictures not found: {broken}"
    if seconds > SLOWEST:
        yield f"took {seconds:.1f} s"


def main(site: Path, out: Path, only: list[str]) -> int:
    """Open the pages, write screenshots, and print the findings."""
    from playwright.sync_api import sync_playwright

    address, wrong = serve(site), 0
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(file.parent.relative_to(site)) for file in sorted(site.rglob("index.html"))]
    chosen = [path for path in paths if not only or any(word in path for word in only)]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                for path in chosen:
                    page, asked = context.new_page(), list[str]()
                    page.on("request", lambda request, asked=asked: asked.append(request.url))
                    began = time.perf_counter()
                    page.goto(f"{address}/{path}/")
                    seconds = time.perf_counter() - began
                    page.wait_for_load_state("networkidle")
                    page.screenshot(path=out / f"{path.replace('/', '_').replace('.', 'home')}-{size}-{scheme}.png", full_page=True)
                    for finding in findings(page, address, seconds, asked):
                        wrong += 1
                        print(f"/{path} {size} {scheme}: {finding}", flush=True)
                    page.close()
                context.close()
        browser.close()
    print(f"{len(chosen)} pages at {len(SIZES)} widths in light and dark: {wrong} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
