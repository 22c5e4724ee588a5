"""Hostile texts, other sites, a product's page, and what people who cannot see or use a mouse need: in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium
from hostile import XSS
from test_page import ROWS, enter, ready, said

from align.feedback.events import Item
from align.feedback.server.tokens import load_secret, mint_token

CONTRAST = """(() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number);
    return c.startsWith('color(') ? [n[0] * 255, n[1] * 255, n[2] * 255, n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => { const f = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join('');
    const box = e.getBoundingClientRect();
    if (!text || box.width < 2 || e.closest(':disabled, .unseen, dialog:not([open])')) continue;
    const layers = []; let opacity = 1;
    for (let up = e; up; up = up.parentElement) {
      layers.push(parse(getComputedStyle(up).backgroundColor)); opacity *= Number(getComputedStyle(up).opacity); }
    let back = matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0, 1] : [255, 255, 255, 1];
    for (const layer of layers.reverse()) back = over(layer, back);
    const ink = parse(getComputedStyle(e).color); ink[3] *= opacity;
    const [a, b] = [light(over(ink, back)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className} ${text.slice(0, 30)}`);
  }
  return poor;
})()"""


def test_hostile_texts_stay_texts(serve: Any, browser: Chromium):
    """Each payload stands in every place a text can come from; none runs, none becomes an element, none is lost."""
    sample = XSS[::10]
    assert len(sample) >= 50
    rows = [
        {"prompt": text, "input": text, "response": [{"role": text, "content": text}] if i % 2 else text}
        for i, text in enumerate(sample)
    ]
    served = serve(
        {
            "kind": "rating", "question": sample[0], "instructions": "\n\n".join(sample),
            "dimensions": [{"name": "quality", "question": sample[1], "low": sample[2], "high": sample[3]}],
            "examples": [{"prompt": t, "responses": [t], "answer": t, "why": t} for t in sample[:5]],
            "ask_reason": "required",
        },
        rows,
    )  # fmt: skip
    enter(browser, served.url, sample[4][:60])
    allowed = {
        "A", "B", "BODY", "BUTTON", "CODE", "DD", "DIALOG", "DIV", "DL", "DT", "EM", "FIELDSET", "FOOTER", "FORM", "H1", "H2",
        "H3", "H4", "HEADER", "INPUT", "KBD", "LABEL", "LEGEND", "LI", "MAIN", "NAV", "OL", "P", "PROGRESS", "SECTION", "SPAN",
        "STRONG", "TEXTAREA", "UL",
    }  # fmt: skip
    for place, text in enumerate(sample):
        browser.wait(f"document.querySelector('.count b').textContent === '{place}'")
        shown = browser.run("[...document.querySelectorAll('.asked .text, .output .text')].map(e => e.textContent)")
        # A parser of HTML keeps no carriage returns and no NULs; nothing else may change.
        assert shown == [text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")] * 3
        assert (
            set(browser.run("[...new Set([...document.querySelectorAll('body, body *')].map(e => e.tagName))]"))
            <= allowed
        )
        attributes = browser.run(
            "[...document.querySelectorAll('body *')].flatMap(e => [...e.attributes].map(a => a.name)).filter(n => n.startsWith('on'))"
        )
        assert attributes == [] and browser.run("typeof window.hacked") == "undefined"
        browser.run(f"document.querySelector('#reason').value = {json.dumps(text)}")
        browser.key("4", "Enter")
    browser.wait(f"document.querySelector('.count b').textContent === '{len(sample)}'")
    browser.key("u")
    browser.wait("document.querySelector('#reason')")
    assert browser.run("typeof window.hacked") == "undefined"
    reasons = [e.value for e in served.events("text")]
    assert reasons == [t.replace("\r\n", "\n").replace("\r", "\n").strip() for t in sample[:-1]]


def test_the_policy_stops_a_script_that_gets_in(serve: Any, chromium: Chromium):
    """The second line of defence: inline scripts, handlers, foreign files and evaluated texts do not run."""
    chromium.new_page()
    served = serve({"kind": "thumbs"}, ROWS)
    enter(chromium, served.url)
    chromium.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\"><a id=j href=\"javascript:window.hacked=2\">x</a>');"
        "const s = document.createElement('script'); s.textContent = 'window.hacked=3'; document.body.append(s);"
        "const f = document.createElement('script'); f.src = 'data:text/javascript,window.hacked=4'; document.body.append(f);"
        "document.querySelector('#j').click()"
    )
    assert chromium.run("new Promise(r => setTimeout(() => r(typeof window.hacked), 200))") == "undefined"
    assert any("Content Security Policy" in text for text in chromium.complaints())


@pytest.mark.parametrize("kind", ["rating", "pairwise", "ranking", "thumbs"])
def test_names_contrast_and_focus(serve: Any, browser: Chromium, kind: str):
    task = {"kind": kind, "ask_reason": "optional"} | ({"reactions": ["love"]} if kind == "thumbs" else {})
    served = serve(task, ROWS[:2])
    enter(browser, served.url)
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("radio", "checkbox", "button", "textbox", "link", "progressbar", "image", "group")
    named = [
        (n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if n.get("role") and not n.get("ignored")
    ]
    assert {role for role, _ in named} >= {"radio", "button", "textbox", "main", "banner", "contentinfo"}
    assert [role for role, name in named if role in roles and not name.strip()] == []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        assert browser.run(CONTRAST) == []
    browser.run("document.activeElement.blur()")
    unseen = []
    for _ in range(25):
        browser.key("Tab")
        seen = browser.run(
            "(() => { const e = document.activeElement; if (e === document.body) return 'body';"
            " const s = e.matches('label > input') ? e.nextElementSibling : e; const c = getComputedStyle(s);"
            " return c.outlineStyle !== 'none' && parseFloat(c.outlineWidth) >= 2 ? '' : e.outerHTML.slice(0, 80); })()"
        )
        if seen == "body":
            break
        unseen += [seen] if seen else []
    assert unseen == []


def test_a_narrow_screen_does_not_scroll_sideways(serve: Any, browser: Chromium, picture: Any):
    served = serve({"kind": "pairwise", "both_bad": True}, ROWS)
    browser.size(390, 844)
    enter(browser, served.url)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.screenshot(picture("feedback_narrow"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Another site, on a port of its own, serving a folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "favicon.ico").touch()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_a_products_page_posts_its_own_thumbs(serve: Any, chromium: Chromium, site: tuple[str, Path], tmp_path: Path):
    chromium.new_page()
    origin, folder = site
    served = serve({"kind": "thumbs"}, ROWS, product_origins=[origin])
    item = Item("How tall is a giraffe?", "About five metres.")
    secret = load_secret(str(served.store) + ".key")
    tokens = [mint_token(secret, item, user="u-17", policy="v9", position=2, propensity=0.5) for _ in range(7)]
    (folder / "index.html").write_text(
        f"<script src='{served.url}static/align-feedback.js'></script><script>const tokens = {json.dumps(tokens)};"
        f"const f = AlignFeedback({{endpoint: '{served.url}', token: () => tokens.shift()}});</script>"
    )
    chromium.open(origin + "/index.html")
    content = json.dumps({"prompt": item.prompt, "response": item.response})
    assert chromium.run(f"f.shown({content})") == {"stored": 1}
    assert chromium.run("f.thumb(true)") == {"stored": 1}
    (event,) = served.events()
    assert (event.kind, event.value, event.items, event.source) == ("binary", True, (item.id,), "user")
    assert (event.policy, event.position, event.propensity, event.exposure) == ("v9", 2, 0.5, "shown")
    assert [e.annotator for e in served.events("exposure")] == [event.annotator] and "u-17" not in event.annotator
    # The user changes their mind: the new token's answer replaces the first.
    assert chromium.run("f.send({thumb: false, reactions: ['sad'], comment: 'Taller!'})") == {"stored": 3}
    assert said(served) == [("binary", "thumb", False), ("reaction", "sad", "sad"), ("text", "comment", "Taller!")]
    # A set button that is pressed again is taken back; pressed once more, it is set.
    chromium.run("f.thumb(false)")
    assert said(served) == [("reaction", "sad", "sad"), ("text", "comment", "Taller!")]
    chromium.run("f.thumb(false)")
    chromium.run("f.react('sad')")
    assert said(served) == [("text", "comment", "Taller!"), ("binary", "thumb", False)]
    chromium.run("f.retract('comment', 'thumb')")
    assert said(served) == []
    chromium.run("f.thumb(false)")
    assert said(served) == [("binary", "thumb", False)]
    assert chromium.complaints() == []


def test_another_site_can_neither_read_nor_write(serve: Any, chromium: Chromium, site: tuple[str, Path]):
    """A page elsewhere, open in the browser of somebody who is signed in here."""
    chromium.new_page()
    origin, folder = site
    served = serve({"kind": "thumbs"}, ROWS)
    enter(chromium, served.url)
    ticket = chromium.run("document.querySelector('[name=ticket]').value")
    (folder / "evil.html").write_text(
        f"<form action='{served.url}answer' method=post><input name=ticket value='{ticket}'>"
        "<input name=thumb value=up></form>"
    )
    # Sites on two ports of one address are one site to cookies, so the cookie does travel: only the origin check stops it.
    chromium.open(origin + "/evil.html")
    read = "fetch('%s', {method: '%s', credentials: 'include'}).then(r => r.text()).catch(e => 'no')"
    assert chromium.run(read % (served.url + "work", "GET")) == "no"
    assert chromium.run(read % (served.url + "undo", "POST")) == "no"
    chromium.run("document.forms[0].submit()")
    chromium.wait("document.body.innerText.includes('another site')")
    chromium.open(origin + "/evil.html")
    chromium.run(f"document.body.innerHTML = '<iframe src=\"{served.url}work\"></iframe>'")
    chromium.run("new Promise(r => setTimeout(r, 300))")
    assert any("frame-ancestors" in text for text in chromium.complaints())
    assert served.events() == []
    chromium.open(served.url + "work")
    ready(chromium)
