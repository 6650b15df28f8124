"""The pages of docs/pictures: of `fpsc compare` and `fpsc bench`, as a headless browser shows them.

    python bench/screenshots.py                   # both; needs chromium
    python bench/screenshots.py --only report     # of bench/results/quick.json
    python bench/screenshots.py --only compare    # of the demo's two clips, which it draws

The browser has no network: a page that needed any would look broken here.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "bench" / "results"
RECORD = RESULTS / "quick.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
COLOURS = 128
"""Of a picture's palette: pages are flat, and files stay small."""


def shoot(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """The first `size` pixels (width, height) of a page.

    Raises:
        SystemExit: there is no browser.
    """
    from PIL import Image

    from fpsc.files import replacing

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)} (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            (
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"),
                *(f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}"),
                *(f"--screenshot={shot}", page.resolve().as_uri()),
            ),
            check=True,
            capture_output=True,
            timeout=120,
        )
        with Image.open(shot) as image, replacing(picture) as beside:
            image.convert("RGB").quantize(COLOURS).save(beside, optimize=True)
    print(f"written: {picture.relative_to(ROOT)}")


def report(folder: Path) -> None:
    from fpsc.bench.report import write

    write([RECORD], folder / "report.html")
    shoot(folder / "report.html", PICTURES / "report.png", (1200, 2400))


def compare(folder: Path) -> None:
    from fpsc.demo.clips import EXAMPLE, parse_prompt
    from fpsc.demo.run import run
    from fpsc.quality.clips import Clip
    from fpsc.quality.compare import compare, write

    made = run(parse_prompt(EXAMPLE), 0, 20, folder)
    dense, fast = (Clip(side.clip, 8.0, "fpsc demo") for side in (made.dense, made.fast))
    about = {"prompt": EXAMPLE, "seed": made.seed, "steps": made.steps, "policy": "demo"}
    found = compare(dense, fast, ("dense", "fpsattn"), about=about)
    page, _, record = write(found, folder / "compare")
    shutil.copy(record, RESULTS / "compare.json")  # whose numbers the picture shows
    shoot(page, PICTURES / "compare.png", (1100, 1500))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    makers = {"report": report, "compare": compare}
    parser.add_argument("--only", choices=sorted(makers))
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        for name in [only] if only else makers:
            makers[name](Path(folder))


if __name__ == "__main__":
    main()
