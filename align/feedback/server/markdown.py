"""A little Markdown for instructions: everything is escaped first, so a text can hold no HTML of its own.

Understood: `#` to `###` headings, paragraphs, `-` and `1.` lists, **bold**, *italic* and `code`. Everything else,
links and images among it, stays the text it is.
"""

from __future__ import annotations

import re
from html import escape

_INLINE = (
    (re.compile(r"\*\*(?=\S)([^*]+?)(?<=\S)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])"), r"<em>\1</em>"),
)
_HEADING = re.compile(r"(#{1,3})\s+(.+)")
_BULLET = re.compile(r"[-*]\s+(.+)")
_NUMBER = re.compile(r"\d{1,3}[.)]\s+(.+)")


def render_markdown(text: str) -> str:
    """Return `text` as HTML made of h2-h4, p, ul, ol, li, strong, em and code alone, none with an attribute."""
    out: list[str] = []
    words: list[str] = []
    open_list = ""

    def close(new_list: str = "") -> None:
        nonlocal open_list
        if words:
            out.append(f"<p>{_inline(' '.join(words))}</p>")
            words.clear()
        if open_list and open_list != new_list:
            out.append(f"</{open_list}>")
        if new_list and open_list != new_list:
            out.append(f"<{new_list}>")
        open_list = new_list

    for line in text.splitlines():
        row = line.strip()
        if heading := _HEADING.fullmatch(row):
            close()
            level = len(heading[1]) + 1
            out.append(f"<h{level}>{_inline(heading[2])}</h{level}>")
        elif point := _BULLET.fullmatch(row) or _NUMBER.fullmatch(row):
            close("ol" if row[0].isdigit() else "ul")
            out.append(f"<li>{_inline(point[1])}</li>")
        elif not row:
            close()
        elif open_list and line[:1] == " " and out[-1].endswith("</li>"):
            out[-1] = f"{out[-1].removesuffix('</li>')} {_inline(row)}</li>"
        else:
            if open_list:
                close()
            words.append(row)
    close()
    return "\n".join(out)


def _inline(text: str) -> str:
    """Escape, then set what stands between marks; nothing is set inside code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        parts[-2:] = [f"{parts[-2]}`{parts[-1]}"]
    made = []
    for i, part in enumerate(parts):
        safe = escape(part)
        if i % 2:
            made.append(f"<code>{safe}</code>")
            continue
        for pattern, replacement in _INLINE:
            safe = pattern.sub(replacement, safe)
        made.append(safe)
    return "".join(made)
