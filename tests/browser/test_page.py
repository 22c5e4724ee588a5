"""Every kind of task, used in a real browser by keyboard and by mouse, with the events it leaves in the store."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium
from PIL import Image, ImageDraw

from align.feedback.events import Item
from align.feedback.store import Store

PROMPT = "Why does the sky look blue at noon and red at dusk?"
ANSWERS = (
    "Air scatters short wavelengths far more than long ones, so at noon blue light reaches you from every direction. "
    "At dusk the light has crossed so much air that most of the blue is gone, and red is what remains.",
    "Because it reflects the sea, which is blue.",
    "It is about Rayleigh scattering.\n\n1. Blue light scatters the most.\n2. The path through the air is longer at dusk.",
    "The sky is blue because of the way that light behaves.",
)
ROWS = [{"prompt": PROMPT, "response": answer, "policy": f"v{i}"} for i, answer in enumerate(ANSWERS)]
IDS = [Item(PROMPT, answer).id for answer in ANSWERS]
GUIDE = {
    "instructions": "# How to rate\n\nRead the **whole** response, then judge it.\n\n"
    "- *Accuracy*: is every claim right?\n- Write `?` for the keys.\n\n1. First read.\n2. Then rate.",
    "examples": [
        {
            "prompt": "What is 7 times 8?", "responses": ["It is 54."], "answer": "Accuracy 1",
            "why": "The only claim is wrong.",
        }
    ],
}  # fmt: skip


def enter(browser: Chromium, url: str, name: str = "Ana") -> None:
    browser.open(url)
    browser.click("#who")
    browser.type(name)
    browser.key("Enter")
    start(browser)


def start(browser: Chromium) -> None:
    """Press Enter on the instructions."""
    browser.wait("(document.activeElement || {}).id === 'start'")
    browser.key("Enter")
    ready(browser)


def ready(browser: Chromium) -> None:
    """Wait until a screen stands there and its script listens."""
    browser.wait("document.querySelector('#screen') && document.documentElement.classList.contains('js')")
    browser.wait("document.readyState === 'complete'")


def done(browser: Chromium, count: int) -> None:
    """Wait for the screen that says so many are done."""
    browser.wait(f"document.querySelector('.count b').textContent === '{count}'")


def said(served: Any) -> list[tuple[str, str, Any]]:
    return [(e.kind, e.key, e.value) for e in served.events()]


def test_rating_by_keyboard_with_undo_and_resume(serve: Any, browser: Chromium, picture: Any):
    task = {
        "kind": "rating", "name": "Helpfulness", **GUIDE,
        "dimensions": [
            {"name": "accuracy", "question": "Is it accurate?", "low": "every claim is wrong", "high": "every claim is right"},
            {"name": "coherence", "question": "Does it hang together?"},
        ],
    }  # fmt: skip
    served = serve(task, ROWS, process=True)
    browser.open(served.url)
    browser.screenshot(picture("feedback_enter"))
    browser.click("#who")
    browser.type("Ana")
    browser.key("Enter")
    browser.wait("document.querySelector('#start')")
    assert browser.run("document.querySelector('.prose').innerHTML.includes('<strong>whole</strong>')")
    assert "The only claim is wrong." in browser.text()
    browser.screenshot(picture("feedback_instructions"))
    start(browser)

    browser.key("Enter")
    browser.wait("document.querySelector('#notice').textContent === 'Rate accuracy.'")
    browser.key("6", "3", "ArrowUp", "ArrowRight")
    browser.screenshot(picture("feedback_rating"))
    browser.key("Enter")
    done(browser, 1)
    assert said(served) == [("ordinal", "accuracy", 7), ("ordinal", "coherence", 3)]
    first = served.events()[0]
    assert (first.items, first.scale, first.exposure, first.position, first.policy) == (
        (IDS[0],),
        (1, 7),
        "shown",
        0,
        "v0",
    )
    assert first.source == "human" and first.latency_ms is not None and 0 < first.latency_ms < 20_000
    assert first.annotator.startswith("a-") and "Ana" not in json.dumps([vars(e) for e in served.events()])

    browser.key("u")
    done(browser, 0)
    assert said(served) == []
    assert browser.run("[...document.querySelectorAll('#answer input:checked')].map(i => i.value).join()") == "7,3"
    browser.key("2", "Enter")
    done(browser, 1)
    assert said(served) == [("ordinal", "accuracy", 2), ("ordinal", "coherence", 3)]
    assert [e.items for e in served.events("exposure")] == [(IDS[0],), (IDS[1],)]

    served.stop(signal.SIGTERM)
    again = serve(process=True)
    browser.send("Network.clearBrowserCookies")
    enter(browser, again.url, " ana")
    done(browser, 1)
    assert ANSWERS[1] in browser.text()
    for place in (2, 3, 4):
        browser.key("4", "5", "Enter")
        done(browser, place)
    browser.wait("document.querySelector('h1') && document.querySelector('h1').textContent.startsWith('All done')")
    browser.screenshot(picture("feedback_done"))
    assert len(again.events()) == 8 and len(again.events("exposure")) == 4


def test_rating_by_mouse_with_reason_and_correction(serve: Any, browser: Chromium, picture: Any):
    served = serve({"kind": "rating", "ask_reason": "required", "ask_correction": "optional"}, ROWS[1:2])
    enter(browser, served.url)
    browser.scheme("dark")
    browser.click("input[name=d0][value='2'] + span")
    browser.click("#next")
    browser.wait("document.querySelector('#notice').textContent === 'Say why.'")
    browser.click("#reason")
    browser.type("It is <b>wrong</b>: the sea reflects the sky.")
    browser.click("#correction")
    browser.run("document.querySelector('#correction').select()")
    browser.type("Air scatters blue light most.")
    browser.screenshot(picture("feedback_reason_dark"))
    browser.key("ctrl+Enter")
    done(browser, 1)
    assert said(served) == [
        ("ordinal", "quality", 2),
        ("text", "reason", "It is <b>wrong</b>: the sea reflects the sky."),
        ("text", "correction", "Air scatters blue light most."),
    ]


def test_pairwise_by_keyboard_and_mouse(serve: Any, browser: Chromium, picture: Any):
    served = serve({"kind": "pairwise", "both_bad": True, "question": "Which explains it better?"}, ROWS)
    enter(browser, served.url)
    browser.key("a", "Enter")
    done(browser, 1)
    browser.key("ArrowLeft", "ArrowRight")
    browser.screenshot(picture("feedback_pairwise"))
    browser.key("Enter")
    done(browser, 2)
    browser.key("t", "Enter")
    done(browser, 3)
    browser.click("input[value=both_bad] + span")
    browser.click("#next")
    done(browser, 4)
    browser.click("[data-choice=b] .text")
    browser.click("#next")
    done(browser, 5)
    browser.click("#skip")
    browser.wait("document.querySelector('h1')")
    assert "1 was set aside" in browser.text()
    events = served.events()
    assert [(e.value, e.tie_origin) for e in events] == [
        ("a", ""), ("b", ""), ("tie", "judged"), ("both_bad", ""), ("b", ""),
    ]  # fmt: skip
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert [e.items for e in events] == [(IDS[i], IDS[j]) for i, j in pairs]
    assert len(served.events("exposure")) == 6
    browser.click("main button")
    browser.wait("document.querySelector('#answer')")
    browser.click("#undo")
    done(browser, 4)
    assert [e.value for e in served.events()] == ["a", "b", "tie", "both_bad"]


def test_both_orders_are_asked_of_one_annotator(serve: Any, browser: Chromium):
    served = serve({"kind": "pairwise", "both_orders": True, "tie": False, "order": "random"}, ROWS[:2])
    enter(browser, served.url)
    assert not browser.run("document.querySelector('input[value=tie]')")
    browser.key("t", "a", "Enter")
    done(browser, 1)
    browser.key("a", "Enter")
    done(browser, 2)
    assert {(e.items, e.value) for e in served.events()} == {((IDS[0], IDS[1]), "a"), ((IDS[1], IDS[0]), "a")}


def test_ranking_by_keyboard_and_by_dragging(serve: Any, browser: Chromium, picture: Any):
    rows = [*ROWS, *({"prompt": "Name a small bird", "response": name} for name in ("Wren", "Robin", "Goldcrest"))]
    served = serve({"kind": "ranking"}, rows)
    enter(browser, served.url)
    browser.key("1", "3", "2", "3", "d", "ArrowRight", "Enter")
    done(browser, 1)
    assert said(served) == [("ranking", "quality", (1, 3, 2, 4))]
    browser.key("u")
    done(browser, 0)
    browser.key("d", "ArrowLeft")
    assert (
        browser.run("[...document.querySelectorAll('.tier[data-rank=\"3\"] .chip')].map(c => c.textContent).join()")
        == "B,D"
    )
    browser.screenshot(picture("feedback_ranking"))
    browser.key("Enter")
    done(browser, 1)
    assert said(served) == [("ranking", "quality", (1, 3, 2, 3))]
    assert served.events()[0].items == tuple(IDS)

    browser.drag("[data-place='0'] .grip", ".tier[data-rank='2']")
    browser.drag("[data-place='1'] .grip", ".tier[data-rank='3']")
    browser.drag(".chip[data-place='2']", ".tier[data-rank='2']")
    browser.drag(".chip[data-place='1']", ".tier[data-rank='']")
    browser.click("#next")
    browser.wait("document.querySelector('#notice').textContent === 'Give every output a rank.'")
    browser.drag(".chip[data-place='1']", ".tier[data-rank='1']")
    browser.click("#next")
    done(browser, 2)
    assert said(served)[1:] == [("ranking", "quality", (2, 1, 2))]


def test_thumbs_and_reactions_by_keyboard_and_mouse(serve: Any, browser: Chromium, picture: Any):
    served = serve({"kind": "thumbs", "reactions": ["love", "funny", "too_long"], "ask_reason": "optional"}, ROWS[:3])
    enter(browser, served.url)
    browser.key("ArrowUp", "1", "3", "r")
    browser.type("Clear and short.")
    browser.screenshot(picture("feedback_thumbs"))
    browser.key("ctrl+Enter")
    done(browser, 1)
    assert said(served) == [
        ("binary", "thumb", True), ("reaction", "love", "love"), ("reaction", "too_long", "too_long"),
        ("text", "reason", "Clear and short."),
    ]  # fmt: skip
    browser.click("#next")
    browser.wait("document.querySelector('#notice').textContent.startsWith('Choose a thumb')")
    browser.click("input[value=down] + span")
    browser.click("input[value=funny] + span")
    browser.click("#next")
    done(browser, 2)
    assert said(served)[4:] == [("binary", "thumb", False), ("reaction", "funny", "funny")]
    browser.key("2", "Enter")
    done(browser, 3)
    assert said(served)[6:] == [("reaction", "funny", "funny")]


def draw(path: Path, colour: str, shape: str) -> None:
    image = Image.new("RGB", (384, 288), "#f4efe6")
    pen = ImageDraw.Draw(image)
    getattr(pen, shape)((92, 44, 292, 244), fill=colour)
    image.save(path)


def record(browser: Chromium, colour: str) -> bytes:
    """Let the browser itself make a short video of a moving square."""
    script = """(async () => {
      const canvas = document.createElement('canvas'); canvas.width = 320; canvas.height = 180;
      const pen = canvas.getContext('2d'); let x = 0;
      const timer = setInterval(() => { pen.fillStyle = '#f4efe6'; pen.fillRect(0, 0, 320, 180);
        pen.fillStyle = '%s'; pen.fillRect(x += 4, 60, 60, 60); }, 30);
      const recorder = new MediaRecorder(canvas.captureStream(30), { mimeType: 'video/webm' });
      const parts = []; recorder.ondataavailable = (e) => parts.push(e.data);
      recorder.start(); await new Promise((r) => setTimeout(r, 700));
      await new Promise((r) => { recorder.onstop = r; recorder.stop(); }); clearInterval(timer);
      const raw = new Uint8Array(await new Blob(parts).arrayBuffer());
      return btoa(Array.from(raw, (b) => String.fromCharCode(b)).join(''));
    })()"""
    return base64.b64decode(browser.run(script % colour))


def test_images(serve: Any, browser: Chromium, picture: Any, tmp_path: Path):
    (tmp_path / "images").mkdir()
    draw(tmp_path / "images" / "a.png", "#c0392b", "ellipse")
    draw(tmp_path / "images" / "b.jpg", "#2980b9", "rectangle")
    rows = [{"prompt": "a red circle on cream paper", "images": ["images/a.png", "images/b.jpg"]}]
    served = serve({"kind": "pairwise", "both_bad": True}, rows)
    enter(browser, served.url)
    browser.wait("[...document.images].length === 2 && [...document.images].every(i => i.naturalWidth === 384)")
    browser.key("a")
    browser.screenshot(picture("feedback_images"))
    browser.key("Enter")
    done(browser, 1)
    (event,) = served.events()
    with Store.open(served.store) as store:
        shown = store.items(event.items)
    assert [shown[i].response for i in event.items] == ["images/a.png", "images/b.jpg"] and event.value == "a"


def test_videos(serve: Any, browser: Chromium, picture: Any, tmp_path: Path):
    browser.open("about:blank#record")
    (tmp_path / "one.webm").write_bytes(record(browser, "#c0392b"))
    served = serve({"kind": "thumbs"}, [{"prompt": "a red square moves to the right", "video": "one.webm"}])
    enter(browser, served.url)
    browser.wait("document.querySelector('video').readyState >= 2")
    browser.key("p")
    browser.wait("!document.querySelector('video').paused && document.querySelector('video').currentTime > 0.05")
    browser.key("p", "ArrowUp")
    browser.screenshot(picture("feedback_video"))
    browser.key("Enter")
    done(browser, 1)
    assert said(served) == [("binary", "thumb", True)]


def test_chats(serve: Any, browser: Chromium, picture: Any):
    chat = [
        {"role": "user", "content": "Can you recommend a book about birds?"},
        {"role": "assistant", "content": "Gladly. For birds at home or for birds on the road?"},
        {"role": "user", "content": "At home, for a child of six."},
    ]
    rows = [{"prompt": chat, "response": [{"role": "assistant", "content": "A picture book with a sound button."}]}]
    rows.append({"prompt": chat, "response": "An encyclopedia in nine volumes."})
    served = serve({"kind": "rating", "scale": [0, 10]}, rows)
    enter(browser, served.url)
    assert browser.run("document.querySelectorAll('.asked .turn').length") == 3
    browser.key("8")
    browser.screenshot(picture("feedback_chat"))
    browser.key("Enter")
    done(browser, 1)
    assert said(served) == [("ordinal", "quality", 8)]


@pytest.mark.parametrize(
    "kind", ["rating", "ranking", *(pytest.param(k, marks=pytest.mark.slow) for k in ("pairwise", "thumbs"))]
)
def test_the_page_works_without_scripts(serve: Any, browser: Chromium, kind: str):
    served = serve({"kind": kind}, ROWS[:2])
    browser.scripts(False)
    browser.open(served.url)
    browser.click("#who")
    browser.type("Ana")
    browser.key("Enter")
    browser.wait("document.querySelector('#start')")
    browser.click("#start")
    browser.wait("document.querySelector('#answer')")
    clicks = {
        "rating": ["[name=d0][value='5']"], "pairwise": ["[value=tie]"], "thumbs": ["[value=down]"],
        "ranking": ["[name=r0][value='2']", "[name=r1][value='1']"],
    }[kind]  # fmt: skip
    browser.click("#next")
    browser.wait("document.querySelector('#notice').textContent !== ''")
    for selector in clicks:
        browser.click(f"{selector} + span")
    browser.click("#next")
    done(browser, 1)
    assert [e.value for e in served.events()] == [
        {"rating": 5, "pairwise": "tie", "ranking": (2, 1), "thumbs": False}[kind]
    ]
    browser.click("#undo")
    done(browser, 0)
    assert served.events() == []
    browser.scripts(True)


def test_a_token_behind_the_hash_enters_and_is_wiped(serve: Any, browser: Chromium, tmp_path: Path):
    (tmp_path / "tokens.txt").write_text("ana 0123456789abcdef-ana\nbea 0123456789abcdef-bea # second shift\n")
    served = serve({"kind": "thumbs"}, ROWS, annotator_tokens=tmp_path / "tokens.txt")
    browser.open(served.url + "#0123456789abcdef-bea")
    browser.wait("document.querySelector('#start')")
    assert "0123456789" not in browser.run("location.href + document.referrer + document.cookie")
    start(browser)


def test_a_server_that_is_gone_loses_no_answer(serve: Any, browser: Chromium):
    served = serve({"kind": "thumbs"}, ROWS, process=True)
    enter(browser, served.url)
    browser.key("ArrowUp")
    served.stop(signal.SIGKILL)
    browser.key("Enter")
    browser.wait("document.querySelector('#notice').textContent.startsWith('Not saved')")
    assert browser.run("document.querySelector('input[value=up]').checked")
    again = serve(port=int(served.url.rpartition(":")[2].strip("/")))
    browser.key("Enter")
    done(browser, 1)
    assert said(again) == [("binary", "thumb", True)]
    browser.events.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("required", "code", "word"), [("", 0, "skipped"), ("1", 1, "error")])
def test_without_a_browser_tests_skip_visibly_or_fail(required: str, code: int, word: str):
    environment = {**os.environ, "PATH": "/nowhere", "ALIGN_REQUIRE_CHROMIUM": required, "PYTHONPATH": "."}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "tests/browser/test_page.py",
        "-k",
        "test_chats",
        "-p",
        "no:cacheprovider",
    ]
    found = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == code and f"1 {word}" in found.stdout and "was not tested in a browser" in found.stdout
