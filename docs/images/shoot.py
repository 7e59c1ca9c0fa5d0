"""Make the pictures of README: `python docs/images/shoot.py cwdpo-demo/report.html`.

Needs the extra `[test]` (Playwright) and Chromium; writes WebP files beside itself.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

HERE = Path(__file__).parent
SIZE: ViewportSize = {"width": 1280, "height": 1000}


def verdict(page: Page) -> None:
    """The top of the page."""


def dynamics(page: Page) -> None:
    """The learning curves."""
    page.evaluate("document.getElementById('dynamics').scrollIntoView()")


def samples(page: Page) -> None:
    """A question that the system got right and the baseline wrong."""
    page.select_option("#task", label="mmmu")
    page.select_option("#system", label="cw-dpo")
    page.click("[data-filter=win]")
    page.evaluate("document.getElementById('samples').scrollIntoView()")
    page.focus("#list")
    page.mouse.move(0, 0)


SHOTS = {
    # Name → what to show, and whether in the dark theme.
    "report-verdict": (verdict, False),
    "report-dynamics": (dynamics, False),
    "report-samples": (samples, True),
}


def main(report: Path) -> None:
    """Open the report once a picture."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (prepare, dark) in SHOTS.items():
            scheme: Literal["dark", "light"] = "dark" if dark else "light"
            page = browser.new_page(viewport=SIZE, color_scheme=scheme, device_scale_factor=1.5)
            page.goto(report.resolve().as_uri())
            prepare(page)
            shot = Image.open(io.BytesIO(page.screenshot()))
            shot.save(HERE / f"{name}.webp", quality=80, method=6)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
