"""The page of inspect opens from disk in a browser, shows the figures, and asks nobody for more.

Needs a Chromium: `chromium-headless-shell`, `chromium` or Chrome on the path, or in $CHROMIUM.
"""

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from decant.schemas import Truncation
from decant.storage.__main__ import main
from decant.storage.cli import process as cli
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.html import report_html
from tests.support import caches

SETTINGS = caches.Settings(temperatures=(1.0, 2.0))
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason=f"no Chromium: none of {', '.join(BROWSERS)} on the path, nor $CHROMIUM set",
)
VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small cache whose names want escaping, beside the JSON of the same."""
    folder = tmp_path_factory.mktemp("<page> & more")
    caches.write_cache(folder / "cache", SETTINGS, caches.random_shards(SETTINGS))
    assert main(["inspect", str(folder / "cache"), "--html", str(folder / "page.html")]) == cli.DONE
    return folder / "page.html"


class Checker(HTMLParser):
    """Collects the text; asserts that every element is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element of SVG without content."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def figures(page: Path) -> list[str]:
    """Some of the JSON's figures as the page must show them."""
    report = inspect(page.parent / "cache")
    at = report.temperatures[1]
    assert report.calibration_error is not None and report.beyond_k is not None
    return [
        f"{report.targets:,}",
        f"{report.teacher_ce:.4f}",
        f"{report.top1_agreement:.2%}",
        f"{report.calibration_error:.4f}",
        f"{at.retained_mass.p05:.3f}",
        f"{at.teacher_entropy_least.p95:.2f}",
        f"{at.teacher_entropy_most.p95:.2f}",
        f"{report.truncation_curve[3].fkl:.4f}",
        f"{report.truncation_curve[3].bytes_per_target:.1f}",
        f"may cost up to {report.beyond_k:.3g} nats against the whole vocabulary",
        f"{report.logprob_error_max:.2g}",
        f"{1 - report.worst_targets[0].tail_mass:.3f}",
        f"{report.column_bytes['topk_lo']:,}",
        report.dump_speed.by_worker[0].worker,
        "<page> & more" if "<page>" in str(page) else str(page.parent),
    ]


def test_the_page_is_whole_and_alone(page: Path) -> None:
    """Well-formed, every figure there, no script, no link but the empty icon."""
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == [] and checker.links == ["data:,"]
    text = " ".join(checker.text)
    for figure in figures(page):
        assert figure in text, figure
    assert page.read_text() == report_html(inspect(page.parent / "cache"))


def test_every_kind_of_report_has_a_page(tmp_path: Path) -> None:
    """Nothing committed, a part, a sample, drawn entries: the page says so and is well-formed."""
    shards = caches.random_shards(SETTINGS, num_shards=3)
    writer = caches.start_cache(tmp_path / "part", SETTINGS, shards)
    pages = [report_html(inspect(tmp_path / "part"))]
    caches.write_shard(writer, 1, shards[1])
    pages.append(report_html(inspect(tmp_path / "part")))
    caches.write_cache(tmp_path / "whole", SETTINGS, shards)
    pages.append(report_html(inspect(tmp_path / "whole", sample=2)))
    drawn = dataclasses.replace(SETTINGS, truncation=Truncation(method="sample", draws=9))
    caches.write_cache(tmp_path / "drawn", drawn, caches.random_shards(drawn))
    pages.append(report_html(inspect(tmp_path / "drawn")))
    words = ("0 of 3 shards", "1 of 3 shards", "Estimates from", "Draws without log probs")
    for source, word in zip(pages, words, strict=True):
        checker = Checker()
        checker.feed(source)
        assert checker.open == [] and word in html.unescape(source)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without network; what it logs is on stderr."""
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(
                "--enable-logging=stderr",
                "--proxy-server=127.0.0.1:9",
                "--virtual-time-budget=2000",
            ),
            *(f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@needs_browser
def test_a_browser_shows_the_figures_without_complaint(page: Path) -> None:
    """In Chromium: the figures are in its document, and its console is empty."""
    done = browse(page, "--dump-dom")
    shown = html.unescape(re.sub(r"<[^>]*>", " ", done.stdout))
    for figure in figures(page):
        assert figure in shown, figure
    assert "CONSOLE" not in done.stderr


@needs_browser
def test_the_console_is_listened_to(page: Path) -> None:
    """What a page would fetch or run is refused by its own policy, and that is seen."""
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</body>", '<img src="http://x/"></body>'))
    assert "CONSOLE" in browse(broken, "--dump-dom").stderr


PROBE = """<!doctype html><html><body><iframe src="{page}" style="width:{width}px;height:900px;
border:0"></iframe><pre id="out"></pre><script>onload = () => {{
const d = document.querySelector('iframe').contentDocument, r = d.documentElement;
document.getElementById('out').textContent = JSON.stringify({{
scroll: r.scrollWidth, client: r.clientWidth,
narrow: [...d.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width < 40).length,
back: d.defaultView.getComputedStyle(d.body).backgroundColor,
ink: d.defaultView.getComputedStyle(d.body).color}})}}</script></body></html>"""


@needs_browser
@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_reader(page: Path, width: int, scheme: str) -> None:
    """No sideways scrolling on a phone; dark on light, or light on dark where that is preferred."""
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(PROBE.format(page=page.as_uri(), width=width))
    setting = f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}"
    done = browse(probe, "--allow-file-access-from-files", setting, "--dump-dom")
    (out,) = re.findall(r'<pre id="out">(.*?)</pre>', done.stdout)
    found = json.loads(html.unescape(out))
    assert found["client"] == width and found["scroll"] <= width and found["narrow"] == 0
    back, ink = (sum(map(int, re.findall(r"\d+", found[k])[:3])) for k in ("back", "ink"))
    assert back > 600 > 200 > ink if scheme == "light" else ink > 600 > 200 > back
