"""The look every report shares: one self-contained page, numbers set alike, images inside it."""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_PNG = 300_000
"""Bytes above which an image travels inside a page as JPEG."""


def render(template: str, context: dict[str, Any]) -> str:
    """Fill a template of `align/reports/templates`; every value is escaped unless it is Markup."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=number,
        brief=brief,
        count=count,
        signed=signed,
        pct=percent,
        estimate=estimate,
        duration=duration,
        moment=moment,
    )
    return environment.get_template(template).render(context)


def finite(value: Any) -> float | None:
    """Return `value` as a float when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3) -> str:
    """Set a number with `digits` decimals, by power of ten when that would hide it; a dash when missing."""
    found = finite(value)
    if found is None:
        return value if isinstance(value, str) else "–"
    if found and not 10**-digits <= abs(found) < 1e6:
        mantissa, _, exponent = f"{found:.1e}".partition("e")
        return _minus(f"{mantissa}e{int(exponent)}")
    return _minus(f"{found:,.{digits}f}")


def brief(value: Any, digits: int = 4) -> str:
    """Set a number with at most `digits` significant digits, a whole one in full."""
    found = finite(value)
    if found is None:
        return value if isinstance(value, str) else "–"
    if found == round(found) and abs(found) < 1e9:
        return count(found)
    if 1e-4 <= abs(found) < 1e6:
        text = f"{found:,.{max(0, digits - 1 - math.floor(math.log10(abs(found))))}f}"
        return _minus(text.rstrip("0").rstrip(".") if "." in text else text)
    mantissa, _, exponent = f"{found:.{digits - 1}e}".partition("e")
    return _minus(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}")


def signed(value: Any, digits: int = 3) -> str:
    """Set a change with its sign."""
    found = finite(value)
    return "–" if found is None else _minus(f"{found:+,.{digits}f}")


def percent(value: Any, digits: int = 1) -> str:
    """Set a share in percent."""
    found = finite(value)
    return "–" if found is None else _minus(f"{100 * found:.{digits}f}\u00a0%")


def count(value: Any) -> str:
    """Set a whole number with thousands separated."""
    found = finite(value)
    return "–" if found is None else _minus(f"{found:,.0f}")


def duration(value: Any) -> str:
    """Set seconds as people say them: 4.2 s, 3 min 12 s, 2 h 05 min."""
    found = finite(value)
    if found is None:
        return "–"
    if found < 60:
        return f"{found:.1f}\u00a0s"
    if found < 3600:
        return f"{int(found) // 60}\u00a0min {int(found) % 60:02d}\u00a0s"
    return f"{int(found) // 3600}\u00a0h {int(found) % 3600 // 60:02d}\u00a0min"


def moment(value: Any) -> str:
    """Set an ISO 8601 time to the minute; anything else stays as it is."""
    try:
        found = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    return found.strftime("%Y-%m-%d %H:%M ") + (found.tzname() or "")


def estimate(value: Any, digits: int = 3) -> str:
    """Set an estimate with its interval: 0.412 [0.398, 0.425]."""
    if not isinstance(value, dict):
        return "–"
    low, high = finite(value.get("ci_low")), finite(value.get("ci_high"))
    text = number(value.get("mean"), digits)
    return text if low is None or high is None else f"{text} [{number(low, digits)}, {number(high, digits)}]"


def _minus(text: str) -> str:
    return text.replace("-", "−")


@dataclass(frozen=True)
class Sheet:
    """A contact sheet ready for the page, its labels cut off when its geometry is known."""

    step: int
    uri: str
    width: int
    height: int
    rows: int
    columns: int


def load_sheet(path: Path, step: int) -> Sheet | None:
    """Return the contact sheet that `align.tracking.save_grid` wrote, None when it is no readable image."""
    found = open_sheet(path)
    if found is None:
        return None
    image, geometry = found
    return Sheet(step, image_uri(image), image.width, image.height, geometry.get("rows", 0), geometry.get("columns", 0))


def open_sheet(path: Path) -> tuple[Any, dict[str, int]] | None:
    """Return a contact sheet as a PIL image, its labels cut off, and its geometry; None when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            geometry = _geometry(opened.info.get("align.grid"))
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    left = min(int(geometry.get("left", 0)), image.width - 1)
    return image.crop((left, 0, image.width, image.height)), geometry


def _geometry(text: Any) -> dict[str, int]:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        found = {}
    return {k: v for k, v in found.items() if isinstance(v, int) and v >= 0} if isinstance(found, dict) else {}


def image_uri(image: Any, *, largest_png: int = LARGEST_PNG) -> str:
    """Return a PIL image as a data URI: PNG, or JPEG where PNG would be larger than that many bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    kind = "png"
    if buffer.tell() > largest_png:
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, format="JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
