"""Put a run's first and last sample grids side by side, as the pictures in docs/ are made.

python scripts/before_after.py runs/digits docs/pictures/before_after.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    grids = sorted((options.run / "samples").glob("step_*.png"))
    first, last = (Image.open(path) for path in (grids[0], grids[-1]))
    top, gap = 26, 16
    page = Image.new("RGB", (first.width + gap + last.width, first.height + top), "white")
    draw = ImageDraw.Draw(page)
    for x, image, path in ((0, first, grids[0]), (first.width + gap, last, grids[-1])):
        page.paste(image, (x, top))
        draw.text((x + 4, 7), f"step {int(path.stem.removeprefix('step_'))}", fill="black", font_size=14)
    page.save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
