"""AI annotators against a real HTTP server that misbehaves, and replies that must not be guessed at."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.errors import ConfigError, DataError
from align.feedback.annotators import (
    Annotation,
    annotate,
    merge_orders,
    parse_choice,
    parse_rating,
    questions_of,
    ranking_question,
    rating_question,
)
from align.feedback.asking import Attempt, Endpoint, Patience, ask
from align.feedback.events import FeedbackEvent, Item
from align.feedback.judging import judge_card
from align.feedback.store import Store

ITEMS = [Item(f"prompt {p}", f"answer {p}{r}" * (r + 1)) for p in range(3) for r in range(3)]
BY_ID = {item.id: item for item in ITEMS}
QUICK = Patience(concurrency=4, tries=3, backoff=0.01)


class Server:
    """An OpenAI-compatible endpoint whose `answer(text, n)` returns a reply, or a function of the handler."""

    def __init__(self, answer: Callable[[str, int], Any]) -> None:
        self.answer, self.seen, self.open, self.most = answer, [], 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.seen.append((self.path, dict(self.headers), body))
                    outer.open += 1
                    outer.most = max(outer.most, outer.open)
                    text = body["messages"][-1]["content"]
                    n = sum(seen["messages"][-1]["content"] == text for _, _, seen in outer.seen)
                try:
                    found = outer.answer(text, n)
                    if callable(found):
                        found(self)
                    else:
                        reply(self, 200, json.dumps({"choices": [{"message": {"content": found}}]}))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with lock:
                        outer.open -= 1

            def log_message(self, *rest: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def endpoint(self, **more: Any) -> Endpoint:
        return Endpoint(self.url, "judge", **{"timeout": 5.0, **more})


def reply(handler: BaseHTTPRequestHandler, status: int, text: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {**headers, "content-length": str(len(text.encode()))}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(text.encode())


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(answer: Callable[[str, int], Any]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


# --- reading replies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6", 6), (" 6.\n", 6), ("**6**", 6), ("Rating: 6", 6), ("6/7", 6), ("6\n\nIt is accurate, but 2 facts lack.", 6),
        ("First I think.\nRating: 3", 3), ("6\n6", 6),
        ("", None), ("six", None), ("8", None), ("0", None), ("-3", None), ("6.5", None), ("6/10", None), ("5\n6", None),
        ("I would give it a 6", None), ("²", None), ("٦", None), ("6 or 7", None), ("99999999999", None),
    ],
)  # fmt: skip
def test_ratings_are_read_strictly(text: str, value: int | None):
    assert parse_rating(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Output (a)", "a"), ("output (B).", "b"), ("(a)", "a"), ("(a)\n(a)", "a"), ("**Output (b)**", "b"), ("Answer: (a)", "a"),
        ("Output (a)\nIt beats Output (b) by far.", "a"), ("B", "b"), ('"Output (a)"', "a"),
        ("Output (a) and Output (b) are equal", None), ("(a)\n(b)", None), ("Output (b) is better than Output (a).", None),
        ("I prefer (b)", None), ("", None), ("tie", None), ("(c)", None), ("ab", None), ("a b", None),
    ],
)  # fmt: skip
def test_choices_are_read_strictly(text: str, value: str | None):
    assert parse_choice(text) == value


def test_two_orders():
    assert merge_orders("a", "b") == ("a", "") and merge_orders("b", "a") == ("b", "")
    assert merge_orders("a", "a") == merge_orders("b", "b") == ("tie", "position_swap")


def test_questions_show_the_input_only_where_there_is_one_and_no_nan():
    with_input, without = Item("Sum up.", "short", input="long text"), Item("Sum up.", "short")
    assert "Input:\nlong text" in rating_question(with_input).messages[-1]["content"]
    asked = rating_question(without).messages[-1]["content"]
    assert "Input" not in asked and "nan" not in asked
    both = ranking_question(*ITEMS[:2]).messages[-1]["content"]
    assert both.index("(a)") < both.index(ITEMS[0].response) < both.index("(b)") < both.index(ITEMS[1].response)


# --- protocols through events -------------------------------------------------------------------------------------


def run(
    judge: Any, task: str, known: list[FeedbackEvent] | None = None, patience: Patience = QUICK, **more: Any
) -> Any:
    written: list[FeedbackEvent] = []
    found = annotate(BY_ID, known or [], judge, written.extend, Annotation(task, "judge", **more), patience=patience)
    return found, written


def longest(messages: list[dict[str, str]]) -> str:
    a, b = messages[-1]["content"].split("Output (a):\n")[1].split("\n\nOutput (b):\n")
    return "Output (a)" if len(a) > len(b) else "Output (b)"


def test_a_steady_judge_is_asked_in_both_orders_and_says_the_same():
    found, events = run(longest, "ranking")
    pairs = [e for e in events if e.kind == "pairwise"]
    assert (found["questions"], found["valid"], found["verdicts"], found["coverage"]) == (18, 18, 9, 1.0)
    assert found["ties_by_position_swap"] == 0 and len(events) == 27
    for event in pairs:
        winner = BY_ID[event.items["ab".index(event.value)]]
        assert len(winner.response) == max(len(BY_ID[i].response) for i in event.items) and event.source == "ai"


def test_a_judge_that_likes_the_first_place_makes_ties_that_say_so():
    found, events = run(lambda messages: "Output (a)", "ranking")
    pairs = [e for e in events if e.kind == "pairwise"]
    assert found["ties_by_position_swap"] == 9 and {(e.value, e.tie_origin) for e in pairs} == {
        ("tie", "position_swap")
    }
    card = judge_card(events, BY_ID, "judge")
    assert (card["p_first"]["share"], card["swap_tie_rate"], card["attempts"]) == (1.0, 1.0, {"valid": 18})


def test_ratings_and_the_raw_replies_are_kept():
    found, events = run(lambda messages: "5\nbecause", "rating")
    ratings = [e for e in events if e.kind == "ordinal"]
    assert found["verdicts"] == 9 and {(e.value, e.scale, e.reply) for e in ratings} == {(5, (1, 7), "5\nbecause")}
    attempts = [e for e in events if e.key == "quality.attempt"]
    assert len(attempts) == 9 and {(e.kind, e.value, e.reply) for e in attempts} == {("text", "valid", "5\nbecause")}


def test_invalid_replies_are_tried_again_recorded_and_never_guessed():
    replies = Counter()

    def judge(messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        replies[text] += 1
        return "Output (a) or Output (b)?" if replies[text] == 1 or "prompt 0" in text else longest(messages)

    found, events = run(judge, "ranking", patience=Patience(concurrency=1, tries=3, backoff=0))
    assert (found["valid"], found["invalid"], found["attempts"]) == (12, 6, 12 * 2 + 6 * 3)
    assert found["coverage"] == pytest.approx(12 / 18) and found["verdicts"] == 6
    assert Counter(e.value for e in events if e.kind == "text") == {"valid": 12, "invalid": 30}
    assert len({e.identifier for e in events}) == len(events)


def test_a_stopped_run_goes_on_where_it_was():
    _, first = run(longest, "ranking")
    known = [e for e in first[:13] if e.kind == "text"]
    asked = []

    def judge(messages: list[dict[str, str]]) -> str:
        asked.append(messages)
        return longest(messages)

    found, second = run(judge, "ranking", known=known)
    assert found["resumed"] == len(known) and len(asked) == 18 - len(known) and found["coverage"] == 1.0
    pairs = {e.items: e.value for e in first[:13] + second if e.kind == "pairwise"}
    assert pairs == {e.items: e.value for e in first if e.kind == "pairwise"}


def test_label_noise_turns_the_named_share_around_and_is_drawn_by_the_pair():
    items = [Item(f"p{i}", "x" * n) for i in range(1000) for n in (1, 2)]
    by_id = {item.id: item for item in items}

    def flips(p: float) -> tuple[int, list[FeedbackEvent]]:
        written: list[FeedbackEvent] = []
        annotation = Annotation("ranking", "judge", p_flip=p)
        annotate(by_id, [], longest, written.extend, annotation, patience=Patience(concurrency=1))
        pairs = [e for e in written if e.kind == "pairwise"]
        wrong = sum(len(by_id[e.items["ab".index(e.value)]].response) == 1 for e in pairs)
        return wrong, pairs

    wrong, pairs = flips(0.25)
    assert abs(wrong - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5
    noisy = sum(json.loads(e.reply)["noise"] for e in pairs)
    assert abs(noisy - 500) < 4 * (1000 * 0.25) ** 0.5 and flips(0.25)[0] == wrong and flips(0.0)[0] == 0


def test_pairs_a_prompt_are_bounded_and_the_same_again():
    one = questions_of(BY_ID, Annotation("ranking", "judge", pairs=1))
    assert len(one) == 6 and [q.items for q in one] == [
        q.items for q in questions_of(BY_ID, Annotation("ranking", "judge", pairs=1))
    ]


@pytest.mark.parametrize(
    ("annotation", "sentence"),
    [
        (Annotation("thumbs", "j"), "Unknown task 'thumbs'"),
        (Annotation("ranking", "j", p_flip=0.6), "probability from 0 to 0.5"),
    ],
)
def test_impossible_annotations_are_refused(annotation: Annotation, sentence: str):
    with pytest.raises(DataError, match=sentence):
        annotate(BY_ID, [], longest, print, annotation)


def test_images_are_not_shown_to_a_text_judge():
    picture = Item("p", "a.png", media="image")
    with pytest.raises(DataError, match="cannot read image"):
        annotate({picture.id: picture}, [], longest, print, Annotation("rating", "j"))


# --- the wire -------------------------------------------------------------------------------------------------------


def wire(
    server: Server, patience: Patience = QUICK, questions: int = 4, **more: Any
) -> tuple[Counter[str], list[Attempt]]:
    attempts: list[Attempt] = []
    asked = [rating_question(item) for item in ITEMS[:questions]]
    return ask(asked, server.endpoint(**more), attempts.append, patience=patience), attempts


def test_a_request_is_what_the_api_expects(serve: Callable[..., Server]):
    server = serve(lambda text, n: "4")
    counts, _ = wire(server, key="secret")
    assert counts == {"valid": 4, "invalid": 0, "failed": 0, "not_asked": 0, "attempts": 4}
    path, headers, body = server.seen[0]
    assert (
        path == "/v1/chat/completions"
        and {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer secret"
    )
    assert body["model"] == "judge" and [m["role"] for m in body["messages"]] == ["system", "user"]
    assert "secret" not in repr(server.endpoint(key="secret"))


def drop(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.8)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.03)


def flood(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b"x" * 100_000)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (lambda h: reply(h, 500, "oops"), "status 500: oops"),
        (lambda h: reply(h, 429, "slow down", retry_after="0"), "status 429"),
        (lambda h: reply(h, 200, "<html>"), "no chat completion: <html>"),
        (lambda h: reply(h, 200, '{"choices": []}'), "no chat completion"),
        (lambda h: reply(h, 200, '{"choices": [{"message": {"content": null}}]}'), "the reply has no text"),
        (lambda h: reply(h, 200, "[" * 100_000), "no chat completion"),
        (drop, "RemoteProtocolError"),
        (hang, "no whole reply within 0.4 s"),
        (drip, "no whole reply within 0.4 s"),
    ],
)
def test_trouble_is_recorded_and_overcome(serve: Callable[..., Server], trouble: Any, why: str):
    server = serve(lambda text, n: trouble if n == 1 else "4")
    counts, attempts = wire(server, questions=2, timeout=0.4)
    assert (counts["valid"], counts["attempts"]) == (2, 4)
    failed = [a for a in attempts if a.status == "failed"]
    assert len(failed) == 2 and all(why in a.why for a in failed), failed


def test_a_flood_is_cut_off_and_not_asked_for_again(serve: Callable[..., Server]):
    server = serve(lambda text, n: flood)
    counts, attempts = wire(server, questions=1)
    assert counts["failed"] == 1 and len(attempts) == 1 and "longer than 1,000,000 bytes" in attempts[0].why


def test_a_bad_request_is_not_repeated_and_a_refusal_ends_the_run(serve: Callable[..., Server]):
    server = serve(lambda text, n: lambda h: reply(h, 400, "bad"))
    counts, attempts = wire(server)
    assert counts["failed"] == 4 and len(attempts) == 4
    closed = serve(lambda text, n: lambda h: reply(h, 401, "no key"))
    with pytest.raises(ConfigError, match=r"refuses to answer .*status 401: no key. Check the address"):
        wire(closed)
    with pytest.raises(ConfigError, match="no address"):
        ask([rating_question(ITEMS[0])], Endpoint("not a url", "m"), lambda a: None, patience=QUICK)


def test_nobody_there(serve: Callable[..., Server]):
    attempts: list[Attempt] = []
    counts = ask([rating_question(ITEMS[0])], Endpoint("http://127.0.0.1:9/v1", "m"), attempts.append, patience=QUICK)
    assert counts["failed"] == 1 and len(attempts) == 3 and all("ConnectError" in a.why for a in attempts)


def test_the_servers_wish_to_wait_is_granted(serve: Callable[..., Server]):
    server = serve(lambda text, n: (lambda h: reply(h, 429, "", retry_after="1")) if n == 1 else "4")
    began = time.monotonic()
    assert wire(server, questions=1)[0]["valid"] == 1
    assert time.monotonic() - began >= 1


def test_concurrency_is_bounded_and_used(serve: Callable[..., Server]):
    server = serve(lambda text, n: time.sleep(0.05) or "4")
    wire(server, Patience(concurrency=3), questions=9)
    assert server.most == 3


def test_the_deadline_ends_everything(serve: Callable[..., Server]):
    release, asked = threading.Event(), itertools.count(1)
    server = serve(lambda text, n: "4" if next(asked) <= 2 else release.wait(30) or "4")
    began = time.monotonic()
    counts, attempts = wire(server, Patience(concurrency=1, tries=5, deadline=2), questions=9)
    release.set()
    assert time.monotonic() - began < 20
    assert counts["valid"] == 2 and counts["failed"] == 1 and counts["not_asked"] == 6
    assert attempts[-1].why == "the deadline passed"


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_writes_into_the_store_and_resumes_after_a_kill(serve: Callable[..., Server], tmp_path: Path):
    def answer(text: str, n: int) -> str:
        time.sleep(0.02)
        return longest([{"content": text}])

    server, path, out = serve(answer), tmp_path / "s.db", tmp_path / "out.json"
    with Store.open(path) as store:
        store.add(items=ITEMS)
    verb = ["feedback", "annotate", str(path), "--task", "ranking", "--endpoint", server.url, "--model", "judge"]
    assert main([*verb, "--dry-run", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["questions"] == 18 and not server.seen
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli", *verb, "--concurrency", "1"], stdout=subprocess.DEVNULL
    )
    for _ in range(400):
        if len(server.seen) >= 5:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = len(server.seen)
    assert 5 <= before < 18
    assert main([*verb, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["coverage"] == 1.0 and found["resumed"] >= before - 2 and len(server.seen) <= 18 + 2
    with Store.open(path) as store:
        events = list(store.current())
    assert sum(e.kind == "pairwise" for e in events) == 9
    assert all(abs(e.ts - time.time() * 1000) < 600_000 for e in events if e.source == "ai"), "asked just now"


@pytest.mark.parametrize(("reply", "why"), [("no idea", "cannot be read as a rating"), (drop, "RemoteProtocolError")])
def test_the_verb_fails_when_nothing_valid_came_back(serve, tmp_path: Path, capsys, reply: Any, why: str):
    server, path = serve(lambda text, n: reply), tmp_path / "s.db"
    with Store.open(path) as store:
        store.add(items=ITEMS[:2])
    verb = ["feedback", "annotate", str(path), "--task", "rating", "--endpoint", server.url, "--model", "judge"]
    assert main([*verb, "--tries", "1"]) == 2
    err = capsys.readouterr().err
    assert "align: No question got a valid answer: " in err and why in err
    server = serve(lambda text, n: "4")
    verb[verb.index("--endpoint") + 1] = server.url
    assert main(verb) == 0 and main(verb) == 0
    assert len(server.seen) == 2


# --- the judge card -----------------------------------------------------------------------------------------------------


def test_a_judge_card_by_hand():
    items = [(Item(f"p{i}", "short"), Item(f"p{i}", "quite long")) for i in range(4)]
    by_id = {item.id: item for pair in items for item in pair}
    events = []
    for n, (people, judge) in enumerate([("aaa", "a"), ("aab", "b"), ("bbb", "b"), ("ab", "a")]):
        pair = tuple(item.id for item in items[n])
        events += [FeedbackEvent("pairwise", pair, v, annotator=f"h{k}") for k, v in enumerate(people)]
        events.append(FeedbackEvent("pairwise", pair[::-1], "ab"["ab".index(judge) - 1], annotator="j", source="ai"))
    events.append(
        FeedbackEvent("pairwise", tuple(i.id for i in items[0]), "b", annotator="j", source="ai", session="2", ts=1)
    )
    events.append(
        FeedbackEvent("pairwise", tuple(i.id for i in items[0]), "a", annotator="j", source="ai", session="3", ts=2)
    )
    card = judge_card(events, by_id, "j")
    assert card["pairs"]["n"] == 3 and card["pairs"]["agreement"] == pytest.approx(2 / 3)
    assert card["pairs"]["bias"] == pytest.approx(1 / 3) and card["pairs"]["variance"] == pytest.approx(1 / 3)
    assert card["ratings"] == {"n": 0}
    rated = [
        FeedbackEvent("ordinal", (i.id,), v, scale=(1, 7), annotator="h")
        for i, v in zip(items[0] + items[1], (1, 2, 3, 4), strict=True)
    ]
    rated += [
        FeedbackEvent("ordinal", (i.id,), v, scale=(1, 7), annotator="j", source="ai")
        for i, v in zip(items[0] + items[1], (2, 3, 4, 7), strict=True)
    ]
    ratings = judge_card(rated, by_id, "j")["ratings"]
    assert ratings == {"n": 4, "spearman": pytest.approx(1), "mean_difference": 1.5}
