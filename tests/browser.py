"""Looks at a page in a real browser, as a person would: headless Chromium, if there is one."""

import base64
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# No traffic of its own, and no sandbox, which a container may not have.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # for what it asks for all the same
)
_ITS_OWN = re.compile(r"(file|data|chrome|chrome-extension|devtools|about|blob):|https?://[^/]*\.google(apis)?\.com/")
_MEASURE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const beyond = [...document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".scroll") && !e.closest("svg"));
  const found = {
    width: innerWidth, needed: document.documentElement.scrollWidth, images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    beyond: beyond.map(e => e.outerHTML.slice(0, 99)),
    without_alt: images.filter(i => !i.alt).length, ink: getComputedStyle(document.body).color,
    back: getComputedStyle(document.body).backgroundColor, text: document.body.innerText,
  };
  parent.document.documentElement.setAttribute("data-found", btoa(unescape(encodeURIComponent(JSON.stringify(found)))));
});
</script></body>"""


class Seen(NamedTuple):
    """What a browser says of a page."""

    found: dict[str, Any]  # of `_MEASURE`
    console: list[str]  # errors and warnings
    requests: list[str]  # addresses that were asked for, but for those of files and of the page itself


def chromium() -> str:
    """The program; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no chromium")
    return found


def look(page: Path, *, width: int = 390, is_dark: bool = False) -> Seen:
    """The page as it is, for its console and requests, and with a script added that measures it."""
    # 0 is dark, 1 is light.
    scheme = f"--blink-settings=preferredColorScheme={int(not is_dark)}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "net.json")
        as_it_is = _run(folder, page, width, scheme, f"--log-net-log={log}", "--enable-logging=stderr")
        console = [line for line in as_it_is.stderr.splitlines() if "CONSOLE" in line]
        # A log that was cut at the end is not closed.
        addresses = set(re.findall(r'"url":"([a-z]+:[^"]{0,200})', log.read_text(errors="replace")))
        requests = sorted(address for address in addresses if not _ITS_OWN.match(address))
        measured = Path(folder, "measured.html")
        text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())  # which forbids all scripts
        # In a frame: no window is as narrow as a phone.
        inside = html.escape(text.replace("</body>", _MEASURE))
        measured.write_text(f'<iframe width="{width}" height="844" style="border:0" srcdoc="{inside}"></iframe>')
        dom = _run(folder, measured, width, scheme, "--virtual-time-budget=5000").stdout
        code = re.search(r'data-found="([^"]*)"', dom)
    assert code, dom[:500]
    return Seen(json.loads(base64.b64decode(code[1])), console, requests)


def _run(folder: str, page: Path, width: int, *options: str) -> subprocess.CompletedProcess:
    profile = tempfile.mkdtemp(dir=folder)
    command = [
        chromium(), *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},844", *options, "--dump-dom",
        page.resolve().as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
