"""The report in headless Chromium: nothing is wider than the window, no letters overlap, none is too small to read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from raydml.report.page import read_illustrations, write_report
from raydml.study.summary import histories, summarise
from tests.report.test_report import SECTIONS
from tests.report.written_study import add_prefixes, write_study

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALLEST_PX = 11

# The page is in a frame of the tested width, because a window of Chromium has at least 500 pixels.
MEASURE = """
<body style="margin:0"><iframe id="frame" width="%d" height="900" style="border:0" src="report.html"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", () => {
  const page = document.getElementById("frame").contentDocument;
  const open = %s;
  const all = (where, what) => [...where.querySelectorAll(what)];
  const box = (one) => one.getBoundingClientRect();
  for (const one of all(page, "details")) one.open = open;
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const overlaps = [];
  for (const svg of all(page, "svg")) {
    const texts = all(svg, "text");
    texts.forEach((one, place) => {
      const met = texts.slice(place + 1).filter((other) => meet(box(one), box(other)));
      overlaps.push(...met.map((other) => [one.textContent, other.textContent]));
    });
  }
  const small = all(page.body, "*").filter((one) => one.checkVisibility()
    && [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())
    && parseFloat(page.defaultView.getComputedStyle(one).fontSize) < %d).map((one) => one.textContent.slice(0, 40));
  const pictures = all(page, "img");
  document.getElementById("found").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    sections: all(page, "section").map((one) => one.id),
    empty: all(page, "section").filter((one) => box(one).height < 60).map((one) => one.id),
    overlaps, small,
    drawn: pictures.every((one) => one.naturalWidth > 0) && pictures.length,
    charts: all(page, ".plot > svg").map((one) => Math.round(box(one).width)),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt install chromium)")
    study = add_prefixes(write_study(tmp_path_factory.mktemp("study") / "birds"))
    trials = histories(study)
    out = tmp_path_factory.mktemp("report")
    write_report(out, summarise(study), trials, read_illustrations(study), ("html",))
    return out


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("width_px", [1280, 400])
def test_the_page_fits_its_window_and_can_be_read(folder, width_px, is_open):
    wrapper = folder / f"at-{width_px}-{is_open}.html"
    wrapper.write_text(MEASURE % (width_px, str(is_open).lower(), SMALLEST_PX))
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, wrapper.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=120, check=True
    )
    measured = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert measured is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(measured[1]))
    assert found["width"] == width_px
    place = SECTIONS.index("published")
    assert found["sections"] == [*SECTIONS[:place], "prefixes", *SECTIONS[place:]]
    assert found["empty"] == []
    assert found["overlaps"] == []
    assert found["small"] == []
    assert found["drawn"] == 3
    assert min(width for width in found["charts"] if width) > 200
