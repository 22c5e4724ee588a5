"""Rewards on another machine, against real servers: one that is ours, and one that does all that servers do wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from served import Scripted

from align.config import load_rewards
from align.diffusion.digits_data import load_split, prompt_for
from align.errors import ConfigError, RewardError
from align.types import Samples, Video
from rewards import get_reward
from rewards.base import score_safely
from rewards.panel import Panel
from rewards.remote import RemoteReward, remote_rewards, wait_until_healthy
from rewards.roster import entry_of
from rewards.serve import asked_of, build_served, serving
from rewards.streaming import ScoreStream
from rewards.wire import pack_item, unpack_items

ROOT = Path(__file__).parents[2]
SERVED = (
    ("digits/legibility", {}),
    ("digits/raw_ink", {}),
    ("digits/ink_band", {"split": "reward"}),
    ("digits/ink_band", {"split": "evaluator"}),
    ("served:Frames", {}),
    ("served:Turns", {}),
    ("served:Partial", {}),
    ("served:Defect", {}),
    ("served:Slow", {}),
)
EAGER = {"backoff_s": 0.001}


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def url(lines):
    with serving(SERVED, limit_mb=2, log=lines.append) as where:
        yield where


def digits(count=24, channels=1):
    """Real digits, rounded to 8 bits."""
    data = load_split("evaluator")
    images = ((data.images[:count] * 255).round() / 255).expand(-1, channels, -1, -1)
    return Samples([prompt_for(int(d)) for d in data.labels[:count]], images=images)


def flat(values, size=16):
    return torch.stack([torch.full((1, size, size), v) for v in values])


def three():
    return Samples(["x"] * 3, images=flat([0.2, 0.4, 0.6], size=2))


def blank(count):
    return Samples(["a handwritten two"] * count, images=torch.zeros(count, 1, 16, 16))


def all_missing(scores):
    return not scores.valid.any() and np.isnan(scores.values).all() and all(scores.errors)


@contextlib.contextmanager
def scripted(answer, entry=None, **client):
    entry = entry or entry_of("digits/raw_ink", {}, get_reward("digits/raw_ink"))
    with Scripted(entry, answer) as server:
        yield server, RemoteReward("digits/raw_ink", server.url, **{**EAGER, **client})


# --- the same scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["digits/legibility", "digits/raw_ink"])
def test_scores_are_those_of_the_local_reward_to_the_last_bit(url, name, channels):
    local, samples = get_reward(name), digits(channels=channels)
    remote = get_reward(name, placement="remote", url=url, batch_size=64)
    here, there = local.score(samples), remote.score(samples)
    assert here.valid.all() and there.values.tobytes() == here.values.tobytes()
    assert there.names == here.names and there.errors == here.errors
    assert {k: list(v) for k, v in there.extras.items()} == {k: list(v) for k, v in here.extras.items()}
    assert remote.identity() == local.identity() and remote.names == local.names
    assert remote.card.definition == local.card.definition and remote.card.components == local.names
    assert remote.card.needs == () and not remote.card.differentiable


def test_png_rounds_to_8_bits_and_float32_does_not(url):
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [prompt_for(k) for k in range(8)]
    local = get_reward("digits/legibility")
    exact = local.score(Samples(prompts, images=images)).values
    rounded = local.score(Samples(prompts, images=(images * 255).round() / 255)).values
    assert not np.array_equal(exact, rounded)
    for encoding, expected in (("png", rounded), ("float32", exact)):
        remote = get_reward("digits/legibility", placement="remote", url=url, encoding=encoding)
        assert np.array_equal(remote.score(Samples(prompts, images=images)).values, expected)


def test_a_png_is_read_by_others_as_the_same_pixels():
    pixels = torch.arange(0, 252, 14).reshape(3, 2, 3) / 255
    item = json.loads(pack_item(Samples(["x"], images=pixels[None]), 0))
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["image"]))))
    assert read.transpose(2, 0, 1).tolist() == torch.arange(0, 252, 14).reshape(3, 2, 3).tolist()
    back, places, wrong = unpack_items([item])
    assert places == [0] and wrong == [""] and torch.equal(back.images[0], pixels)


def test_order_is_kept_over_many_batches(url):
    values = torch.randperm(50, generator=torch.Generator().manual_seed(1)) / 51
    samples = Samples(["a handwritten two"] * 50, images=flat(values))
    remote = get_reward("digits/raw_ink", placement="remote", url=url, batch_size=3, encoding="float32", max_inflight=5)
    scores = remote.score(samples)
    assert scores.values[:, 0] == pytest.approx(values.numpy(), abs=1e-6)
    empty = remote.score(samples.select([]))
    assert empty.values.shape == (0, 1) and empty.names == ("raw_ink",)


@pytest.mark.parametrize("encoding", ["png", "float32"])
def test_videos_travel_with_their_frame_rate(url, encoding):
    clips = [Video(torch.full((n, 3, 4, 5), k / 255), fps) for n, k, fps in ((3, 51, 8.0), (7, 102, 24), (1, 255, 2.5))]
    remote = get_reward("served:Frames", placement="remote", url=url, encoding=encoding, batch_size=2)
    scores = remote.score(Samples(["x"] * 3, videos=clips))
    assert scores.names == ("first", "count", "seconds") and scores.valid.all()
    expected = [[0.2, 3, 3 / 8], [0.4, 7, 7 / 24], [1, 1, 0.4]]
    assert scores.values == pytest.approx(np.array(expected), abs=1e-6)


def test_texts_chats_and_metadata_travel(url):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four — words are hère"}]
    samples = Samples(
        ["one", "two words", ""],
        texts=["a b c", chat, ""],
        metadata=[{"bonus": np.int64(10)}, {"bonus": 0.5, "note": ["x", None, np.float32(2)]}, {}],
    )
    scores = get_reward("served:Turns", placement="remote", url=url).score(samples)
    assert scores.values[:, 0].tolist() == [3 + 10 - 1, 5 + 0.5 - 2, 0]
    assert scores.extras["last"] == ["a b c", "four — words are hère", ""]
    assert scores.extras["tied"] == [False, False, True]
    assert np.isnan(scores.extras["some"][0]) and scores.extras["some"][1:].tolist() == [3.5, 0]


def test_images_of_several_sizes_and_extras_over_batches(url):
    samples = Samples(
        ["a handwritten two"] * 3, images=[torch.ones(1, 16, 16), torch.ones(1, 8, 8), torch.zeros(3, 16, 16)]
    )
    scores = get_reward("digits/raw_ink", placement="remote", url=url).score(samples)
    assert scores.valid[:, 0].tolist() == [True, False, True] and scores.values[[0, 2], 0].tolist() == [1, 0]
    assert "16x16" in scores.errors[1] and url in scores.errors[1]
    remote = get_reward("digits/legibility", placement="remote", url=url, batch_size=1)
    scores = remote.score(Samples(["a handwritten two", "a red cat"], images=torch.zeros(2, 1, 16, 16)))
    assert np.isfinite(scores.extras["accuracy"][0]) and np.isnan(scores.extras["accuracy"][1])


def test_what_cannot_be_sent_is_missing_and_the_rest_is_scored(url):
    images = [torch.full((1, 16, 16), 0.5) for _ in range(5)]
    images[0] = images[0].clone().fill_(float("nan"))
    images[1] = images[1] + 1
    images[2] = torch.zeros(4, 16, 16)
    metadata = [{}, {}, {}, {"what": {1, 2}}, {}]
    scores = get_reward("digits/raw_ink", placement="remote", url=url).score(
        Samples(["a handwritten two"] * 5, images=images, metadata=metadata)
    )
    assert scores.valid[:, 0].tolist() == [False] * 4 + [True]
    for error, part in zip(scores.errors, ("not numbers", "1.50", "4 channels", "set", ""), strict=True):
        assert part in error


def test_a_component_may_be_missing_alone_and_a_zero_is_a_zero(url):
    scores = get_reward("served:Partial", placement="remote", url=url).score(Samples(["good", "bad"], texts=["", ""]))
    assert scores.valid.tolist() == [[True, True], [True, False]] and scores.values[:, 0].tolist() == [0, 0]
    assert "b: it was bad" in scores.errors[1] and scores.errors[0] == ""


def test_a_defect_of_a_served_reward_is_said_and_the_server_goes_on(url):
    scores = get_reward("served:Defect", placement="remote", url=url, **EAGER, retries=1).score(three())
    assert all_missing(scores) and "no_such_attribute" in scores.errors[0]
    assert get_reward("digits/raw_ink", placement="remote", url=url).healthy()


def test_a_reward_scores_one_request_at_a_time(url):
    remote = get_reward("served:Slow", placement="remote", url=url, batch_size=1, max_inflight=6)
    scores = remote.score(Samples(["x"] * 6, texts=[""] * 6))
    assert scores.values[:, 0].tolist() == [7] * 6


def test_it_can_be_called_from_an_event_loop(url):
    remote = get_reward("digits/raw_ink", placement="remote", url=url)

    async def notebook():
        return remote.score(blank(2))

    assert asyncio.run(notebook()).values[:, 0].tolist() == [0, 0]


# --- building the client ----------------------------------------------------------------------------


def test_the_roster_is_checked_when_the_client_is_built(url):
    def build(name, **args):
        return get_reward(name, placement="remote", url=url, **args)

    with pytest.raises(ConfigError, match="Did you mean 'digits/legibility'"):
        build("digits/legibilty")
    with pytest.raises(ConfigError, match="no argument 'timeout'.*Did you mean 'timeout_s'"):
        build("digits/raw_ink", timeout=3)
    with pytest.raises(ConfigError, match="another split.*'reward' instead of 'evaluator'"):
        build("digits/legibility", split="evaluator")
    with pytest.raises(ConfigError, match="2 rewards 'digits/ink_band'"):
        build("digits/ink_band")
    for split in ("reward", "evaluator"):
        local = get_reward("digits/ink_band", split=split).identity()
        assert build("digits/ink_band", split=split).identity() == local
        assert build("digits/ink_band", identity=local).identity() == local
    with pytest.raises(RewardError, match="identity is .*, not 0123"):
        build("digits/raw_ink", identity="0123")
    for wrong in ({"encoding": "jpeg"}, {"timeout_s": 0}, {"batch_size": 0}, {"retries": -1}, {"max_inflight": 0}):
        with pytest.raises(ConfigError):
            build("digits/raw_ink", **wrong)
    with pytest.raises(ConfigError, match="needs its server"):
        get_reward("digits/raw_ink", placement="remote")
    assert get_reward("digits/raw_ink", placement="remote", url=f"{url}/score").url == url


@pytest.mark.parametrize("wrong", ["gpu-box:8765", "ftp://x", "http://", ""])
def test_a_url_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="URL"):
        RemoteReward("digits/raw_ink", wrong)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_server_is_an_error_after_the_start_up_time():
    began = time.monotonic()
    with pytest.raises(RewardError, match="align rewards serve --reward digits/raw_ink"):
        RemoteReward("digits/raw_ink", f"http://user:secret@127.0.0.1:{free_port()}", startup_s=0.5, backoff_s=0.05)
    assert time.monotonic() - began > 0.3
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RewardError, match="no answer") as error:
        RemoteReward("x", f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}", startup_s=0.3)
    assert "secret" not in str(error.value)


def test_a_server_that_is_still_starting_is_waited_for():
    port = free_port()
    built = []
    thread = threading.Thread(
        target=lambda: built.append(
            RemoteReward("digits/raw_ink", f"http://127.0.0.1:{port}", startup_s=20, backoff_s=0.05)
        )
    )
    thread.start()
    time.sleep(0.2)
    assert not built
    with serving([("digits/raw_ink", {})], port=port):
        thread.join()
    assert built[0].names == ("raw_ink",)


@pytest.mark.parametrize("roster", [{}, {"rewards": [{"reward": "x"}]}, {"rewards": 3}, []])
def test_something_else_at_the_address_is_no_reward_server(roster):
    with Scripted({}, None) as server:
        server.http.RequestHandlerClass.do_GET = lambda handler: handler.give(roster)
        with pytest.raises(RewardError, match="no reward server"):
            RemoteReward("x", server.url, startup_s=5)


# --- failures: none is ever a 0 ---------------------------------------------------------------------


def change(**changes):
    return lambda server, handler, document, n: handler.give(server.good(document, **changes))


def text(body, **how):
    return lambda server, handler, document, n: handler.give(None, text=body, **how)


def cut_short(server, handler, document, n):
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(json.dumps(server.good(document)).encode()[:60])
    handler.hang_up()


FAILURES = {
    "not JSON": (text("<html>all is well</html>"), "not JSON"),
    "truncated JSON": (text('{"names": ["raw_ink"], "values": [[0.0], [0.'), "not JSON"),
    "empty": (text(""), "not JSON"),
    "deep": (text("[" * 100_000), "not JSON"),
    "a list": (text("[0, 0, 0]"), "which reward"),
    "no identity": (change(identity=None), "which reward"),
    "null": (change(values=[[None]] * 3), "no finite number"),
    "NaN": (change(values=[[float("nan")]] * 3), "no finite number"),
    "infinite": (change(values=[[float("inf")]] * 3), "no finite number"),
    "huge": (change(values=[[10**400]] * 3), "no finite number"),
    "text": (change(values=[["0.5"]] * 3), "no finite number"),
    "a bool": (change(values=[[True]] * 3), "no finite number"),
    "not valid": (change(values=[[0.0]] * 3, valid=[[False]] * 3, errors=["out of memory"] * 3), "out of memory"),
    "no reason": (change(values=[[0.0]] * 3, valid=[[False]] * 3), "no reason"),
    "valid is 1": (change(valid=[[1]] * 3), "no reason"),
    "too few": (change(values=[[0.0]] * 2), "2 values for 3 samples"),
    "too many": (change(values=[[0.0]] * 4), "4 values for 3 samples"),
    "no rows": (change(values=None), "no values"),
    "flat rows": (change(values=[0.0] * 3), "rows of another length"),
    "wide rows": (change(values=[[0.0, 0.0]] * 3), "rows of another length"),
    "other names": (change(names=["ink"]), "other components"),
    "other samples": (change(ids=[7, 8, 9]), "other samples"),
    "one sample twice": (change(ids=[0, 1, 1]), "other samples"),
    "ids as text": (change(ids=["0", "1", "2"]), "other samples"),
    "status 400": (text('{"detail": "no such thing."}', status=400), "status 400: no such thing"),
    "status 404": (text("gone", status=404), "status 404"),
    "moved": (text("", status=302, headers=[("location", "http://127.0.0.1:1/")]), "status 302"),
    "status 500": (text("oh", status=500), "status 500, 3 attempts"),
    "status 503": (text('{"detail": "busy"}', status=503), "status 503: busy, 3 attempts"),
    "retry too late": (text("", status=503, headers=[("retry-after", "600")]), "status 503"),
    "cut short": (cut_short, "3 attempts"),
    "dies": (lambda server, handler, document, n: handler.hang_up(), "3 attempts"),
    "bad gzip": (text("not gzip", headers=[("content-encoding", "gzip")]), "header"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_samples_missing_with_server_and_reason(failure):
    broken, reason = FAILURES[failure]
    with scripted(lambda handler, document, n: broken(server, handler, document, n), retries=2) as (server, remote):
        scores = remote.score(three())
        assert all_missing(scores) and scores.names == ("raw_ink",)
        assert all(reason in error and server.url in error for error in scores.errors)
        repeated = any(word in failure for word in ("status 5", "cut short", "dies"))
        assert len(server.asked) == (3 if repeated else 1)
        assert bool(remote.unreachable) == (repeated or failure in ("retry too late", "status 404"))


def test_a_good_answer_of_the_scripted_server_is_taken():
    with scripted(lambda handler, document, n: handler.give(server.good(document))) as (server, remote):
        assert remote.score(three()).values[:, 0].tolist() == [1, 2, 3] and remote.unreachable == ""


def test_rows_in_another_order_still_reach_their_samples():
    def backwards(handler, document, n):
        good = server.good(document)
        handler.give({k: v[::-1] if isinstance(v, list) and k != "names" else v for k, v in good.items()})

    with scripted(backwards, batch_size=2) as (server, remote):
        assert remote.score(three()).values[:, 0].tolist() == [1, 2, 3]


def test_only_the_batch_that_fails_is_missing():
    def second(handler, document, n):
        bad = document["items"][0]["id"] == 2
        handler.give(server.good(document), status=400 if bad else 200)

    with scripted(second, batch_size=2) as (server, remote):
        scores = remote.score(Samples(["x"] * 5, images=flat([0.1] * 5, 2)))
        assert scores.valid[:, 0].tolist() == [True, True, False, False, True]
        assert scores.values[[0, 1, 4], 0].tolist() == [1, 2, 5]


@pytest.mark.parametrize("trouble", ["status", "hang up", "429"])
def test_a_server_that_recovers_is_asked_again(trouble):
    def answer(handler, document, n):
        if n >= 2:
            handler.give(server.good(document))
        elif trouble == "hang up":
            handler.hang_up()
        else:
            handler.give({}, status=500 if trouble == "status" else 429)

    with scripted(answer, retries=2) as (server, remote):
        scores = remote.score(three())
        assert scores.values[:, 0].tolist() == [1, 2, 3] and len(server.asked) == 3
        assert server.asked[0] == server.asked[2] and remote.unreachable == ""


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form):
    from email.utils import formatdate

    def answer(handler, document, n):
        # A date has whole seconds: two of them are at least one from now.
        wait = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
        handler.give(server.good(document), status=200 if n else 503, headers=[] if n else [("retry-after", wait)])

    with scripted(answer) as (server, remote):
        assert remote.score(three()).valid.all()
        assert server.times[1] - server.times[0] >= 0.99


def test_a_hanging_server_is_given_up_after_the_timeout_and_not_asked_again():
    release = threading.Event()
    with scripted(lambda handler, document, n: release.wait(20), timeout_s=0.3) as (server, remote):
        began = time.monotonic()
        scores = remote.score(three())
        assert time.monotonic() - began < 15 and all_missing(scores) and "no answer within 0.3 s" in scores.errors[0]
        assert len(server.asked) == 1 and remote.unreachable
        release.set()


def test_a_server_that_drips_is_given_up_too():
    """Each byte comes in time, the answer never does."""

    def drip(handler, document, n):
        handler.send_response(200)
        handler.send_header("content-length", "10000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(600):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    with scripted(drip, timeout_s=0.4) as (_, remote):
        began = time.monotonic()
        assert all_missing(remote.score(three())) and time.monotonic() - began < 15


def test_the_deadline_of_a_call_keeps_what_came_in_time():
    release = threading.Event()

    def answer(handler, document, n):
        if document["items"][0]["id"]:
            release.wait(20)
        handler.give(server.good(document))

    with scripted(answer, deadline_s=2.0, timeout_s=30, batch_size=1, max_inflight=2) as (server, remote):
        began = time.monotonic()
        scores = remote.score(Samples(["x"] * 6, images=flat([0.1] * 6, 2)))
        assert time.monotonic() - began < 10
        assert scores.valid[:, 0].tolist() == [True] + [False] * 5 and scores.values[0, 0] == 1
        assert all(error for error in scores.errors[1:]) and "2 s of the whole call" in scores.errors[5]
        release.set()


def test_requests_in_flight_are_bounded():
    gate = threading.Barrier(3)

    def answer(handler, document, n):
        gate.wait(10)  # opens only when three are here at once
        time.sleep(0.02)
        handler.give(server.good(document))

    with scripted(answer, batch_size=1, max_inflight=3) as (server, remote):
        assert remote.score(Samples(["x"] * 9, images=flat([0.1] * 9, 2))).valid.all()
        assert server.most == 3 and len(server.asked) == 9


@pytest.mark.parametrize("way", ["in the answer", "as status 409"])
def test_a_server_with_other_weights_is_refused_not_masked(way):
    def answer(handler, document, n):
        if n == 0:
            handler.give(server.good(document))
        elif way == "in the answer":
            handler.give(server.good(document, identity="ffff"))
        else:
            handler.give({"detail": "the identity is ffff here"}, status=409)

    with scripted(answer) as (server, remote):
        panel = Panel([remote, get_reward("digits/raw_ink")], [1.0, 1.0])
        assert remote.score(three()).valid.all()
        with pytest.raises(RewardError, match="ffff"):
            remote.score(three())
        with pytest.raises(RewardError, match="ffff"):
            score_safely(remote, three())
        with pytest.raises(RewardError, match="ffff"):
            panel.score(three())
        server.entry["identity"] = "ffff"
        with pytest.raises(RewardError, match="ffff"):
            remote.healthy()
        server.entry["reward"] = "another"
        with pytest.raises(RewardError, match="does not serve"):
            wait_until_healthy([remote], lambda: False, lambda line: None)


# --- a server that goes and comes back --------------------------------------------------------------


def test_killed_server_masks_pauses_and_goes_on():
    port, samples = free_port(), digits(8)
    with serving([("digits/legibility", {})], port=port) as url:
        remote = get_reward("digits/legibility", placement="remote", url=url, **EAGER)
        before = remote.score(samples)
        assert remote.healthy() and before.valid.all()
    scores = remote.score(samples)
    assert all_missing(scores) and url in scores.errors[0] and remote.unreachable
    panel = Panel([remote], [1.0])
    with pytest.raises(RewardError, match="missing for 8 of 8"):
        panel.require_scored(panel.score(samples), "step 1")

    said, told, stopped = [], threading.Event(), iter([False, True])
    assert not wait_until_healthy([remote], lambda: next(stopped), said.append, poll_s=0.1, most_s=0.1)
    assert len(said) == 2 and url in said[0] and "digits/legibility" in said[0]

    def log(line):
        said.append(line)
        told.set()

    found = []
    threshold = get_reward_around(remote)
    waiting = threading.Thread(
        target=lambda: found.append(wait_until_healthy([threshold], lambda: False, log, poll_s=0.05, most_s=0.2))
    )
    waiting.start()
    assert told.wait(10) and not found
    with serving([("digits/legibility", {})], port=port):
        waiting.join(20)
        assert found == [True] and "all reward servers answer" in said[-1] and remote.unreachable == ""
        assert remote.score(samples).values.tobytes() == before.values.tobytes()


def get_reward_around(remote):
    """A reward that stands around a remote one, as a threshold does."""

    class Around:
        inner = remote

    return Around()


def test_remote_rewards_are_found_inside_others(url):
    remote = get_reward("digits/raw_ink", placement="remote", url=url)
    args = {"placement": "remote", "url": url}
    outer = get_reward("threshold", reward="digits/raw_ink", at=0.5, args=args)
    assert remote_rewards([get_reward("digits/raw_ink"), remote, outer]) == [remote, outer.inner]
    scores = outer.score(Samples(["a handwritten two"] * 2, images=flat([0.2, 0.8])))
    assert scores.values[:, 0].tolist() == [0, 1]
    assert wait_until_healthy([remote, outer], lambda: False, pytest.fail)
    assert not wait_until_healthy([remote, outer], lambda: True, pytest.fail)


# --- scoring while sampling -------------------------------------------------------------------------


def test_a_stream_scores_parts_while_the_next_is_made():
    """The server holds part 1 until part 2 has been submitted: a caller who waited for its scores would never end."""
    second, here = threading.Event(), threading.get_ident()
    local, threads = get_reward("digits/raw_ink"), []

    class Watched:
        names, card, identity = local.names, local.card, local.identity

        def score(self, samples):
            threads.append(threading.get_ident())
            return local.score(samples)

    def answer(handler, document, n):
        assert second.wait(20)
        good = server.good(document)
        handler.give({**good, "values": [[item["metadata"]["value"]] for item in document["items"]]})

    def part(*values):
        metadata = [{"value": value} for value in values]
        return Samples(["a handwritten two"] * len(values), flat([0.5] * len(values)), metadata=metadata)

    with scripted(answer) as (server, remote):
        with ScoreStream(Panel([Watched(), remote], [1.0, 1.0])) as stream:
            stream.submit(part(5, 4))
            stream.submit(part(9))
            second.set()
            scores = stream.result()
        assert scores.values.tolist() == [[0.5, 5], [0.5, 4], [0.5, 9]] and scores.valid.all()
        assert set(threads) == {here}


def test_a_stream_says_what_the_panel_says(url):
    configs = ["digits/legibility", "digits/raw_ink"]
    panel = Panel(
        [get_reward(configs[0], placement="remote", url=url, batch_size=4), get_reward(configs[1])], [1.0, 2.0]
    )
    samples = digits(20)
    with ScoreStream(panel) as stream:
        for start in (0, 4, 8, 12, 16):
            stream.submit(samples.select(range(start, start + 4)))
        parts = stream.result()
    whole = panel.score(samples)
    assert parts.names == whole.names and parts.values == pytest.approx(whole.values, abs=1e-6)
    assert parts.extras.keys() == whole.extras.keys()
    with ScoreStream(panel) as stream, pytest.raises(ConfigError, match="No part"):
        stream.result()
    with pytest.raises(ConfigError):
        ScoreStream(panel, most_parts=0)


def test_a_stream_holds_a_bounded_number_of_parts():
    release, third = threading.Event(), threading.Event()

    def answer(handler, document, n):
        release.wait(20)
        handler.give(server.good(document))

    with scripted(answer) as (server, remote), ScoreStream(Panel([remote], [1.0]), most_parts=2) as stream:
        stream.submit(three())
        stream.submit(three())

        def submit_third():
            stream.submit(three())
            third.set()

        waiting = threading.Thread(target=submit_third)
        waiting.start()
        assert not third.wait(0.3) and len(server.asked) <= 2
        release.set()
        assert third.wait(10)
        waiting.join()
        assert stream.result().values[:, 0].tolist() == [1, 2, 3] * 3


def test_errors_of_a_stream_surface_at_its_result():
    moved = scripted(lambda handler, document, n: handler.give({}, status=409))
    with moved as (_, remote), ScoreStream(Panel([remote], [1.0])) as stream:
        stream.submit(three())
        with pytest.raises(RewardError, match="409"):
            stream.result()


# --- the server -------------------------------------------------------------------------------------


def png(array):
    with io.BytesIO() as file:
        Image.fromarray(array).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def test_one_malformed_item_never_spoils_its_request(url):
    good = png(np.full((16, 16), 51, np.uint8))
    raw = {"shape": [1, 16, 16], "float32": base64.b64encode(np.full(256, 0.5, "<f4").tobytes()).decode()}
    cut = base64.b64encode(base64.b64decode(png(np.zeros((64, 64, 3), np.uint8)))[:-30]).decode()
    images = [
        good, "!!", base64.b64encode(b"GIF89a").decode(), cut, png(np.zeros((16, 16), np.uint16)),
        png(np.zeros((16, 16, 4), np.uint8)), {**raw, "shape": [1, 16, 17]}, {**raw, "shape": [1, -16, -16]},
        {**raw, "shape": [1 << 20, 1 << 20, 1 << 20]}, {"shape": [256], "float32": raw["float32"]}, 7, raw,
    ]  # fmt: skip
    items = [{"id": f"i{k}", "prompt": "a handwritten two", "image": image} for k, image in enumerate(images)]
    items += ["x", {"prompt": 3, "image": good}, {"prompt": "x"}, {"image": good, "text": "both"}]
    found = httpx.post(f"{url}/score", json={"reward": "digits/raw_ink", "items": items}).json()
    valid = [row[0] for row in found["valid"]]
    assert [k for k, ok in enumerate(valid) if ok] == [0, 11]
    assert found["values"][0] == [pytest.approx(0.2)] and found["values"][11] == [0.5]
    assert all(found["values"][k] == [None] and found["errors"][k] for k, ok in enumerate(valid) if not ok)
    assert found["ids"][:2] == ["i0", "i1"] and len(found["ids"]) == 16
    assert found["identity"] == get_reward("digits/raw_ink").identity() and found["ms"] > 0


def test_malformed_videos_and_chats_are_missing(url):
    frame = png(np.zeros((4, 4, 3), np.uint8))
    clips = [
        {"fps": 4, "frames": [frame] * 2}, {"frames": [frame]}, {"fps": 0, "frames": [frame]}, {"fps": 4, "frames": []},
        {"fps": 4, "frames": [frame, png(np.zeros((4, 5, 3), np.uint8))]}, {"fps": "4", "frames": [frame]}, [frame],
    ]  # fmt: skip
    items = [{"prompt": "x", "video": clip} for clip in clips]
    found = httpx.post(f"{url}/score", json={"reward": "served:Frames", "items": items}).json()
    assert found["valid"] == [[True] * 3] + [[False] * 3] * 6 and found["values"][0] == [0, 2, 0.5]
    texts = [{"text": "a"}, {"text": 3}, {"chat": [{"role": "user"}]}, {"chat": "hi"}, {"chat": []}]
    items = [{"prompt": "x", **text} for text in texts[:4]]
    found = httpx.post(f"{url}/score", json={"reward": "served:Turns", "items": items}).json()
    assert [row[0] for row in found["valid"]] == [True, False, False, False]


def test_an_oversized_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("rewards.wire.MOST_NUMBERS", 100)
    small, large = png(np.zeros((10, 10), np.uint8)), png(np.zeros((10, 11), np.uint8))
    _, places, wrong = unpack_items([{"prompt": "x", "image": i} for i in (small, large)])
    assert places == [0] and "too large" in wrong[1]
    clip = {"fps": 1, "frames": [png(np.zeros((5, 9), np.uint8))] * 3}
    assert "too large" in unpack_items([{"prompt": "x", "video": clip}])[2][0]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 422, "not JSON"),
        (b"\xff\xfe", 422, "not JSON"),
        (b"[" * 100_000, 422, "not JSON"),
        (b"[]", 422, "an object with reward"),
        (b'{"reward": "digits/raw_ink", "items": []}', 422, "not empty"),
        (b'{"reward": "digits/raw_inc", "items": [1]}', 404, "Did you mean 'digits/raw_ink'?"),
        (b'{"reward": 3, "items": [1]}', 404, "no reward 3"),
        (b'{"reward": "digits/ink_band", "items": [1]}', 422, "identity of one"),
        (b'{"reward": "digits/raw_ink", "identity": "0", "items": [1]}', 409, "not 0"),
        (b'{"reward": "digits/raw_ink", "items": [{"text": "x"}, {"chat": []}, {"video": {}}]}', 200, None),
        (b" " * 2_000_001, 413, "2 MB"),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(url, lines, body, status, sentence):
    answer = httpx.post(f"{url}/score", content=body)
    assert answer.status_code == status
    if sentence is None:  # texts to an image reward
        assert answer.json()["valid"] == [[False]] * 3
        return
    detail = answer.json()["detail"]
    assert sentence in detail and "\n" not in detail and "Traceback" not in detail
    assert f"/score: {status}" in lines[-1]


def test_kinds_are_not_mixed_and_chunked_bodies_are_limited(url):
    frame = png(np.zeros((16, 16), np.uint8))
    items = [{"prompt": "x", "image": frame}, {"prompt": "x", "text": "y"}]
    answer = httpx.post(f"{url}/score", json={"reward": "digits/raw_ink", "items": items})
    assert answer.status_code == 422 and "images and texts" in answer.json()["detail"]
    answer = httpx.post(f"{url}/score", content=iter([b" " * 500_000] * 5))
    assert answer.status_code == 413


def test_health_roster_and_log(url, lines):
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok" and "digits/raw_ink" in health["rewards"]
    entry = next(e for e in httpx.get(f"{url}/rewards").json()["rewards"] if e["reward"] == "digits/legibility")
    assert entry["args"] == {"split": "reward"} and entry["names"] == ["legibility"]
    assert entry["card"]["range"] == "-8 to 0 nats" and entry["identity"] == get_reward("digits/legibility").identity()
    get_reward("digits/raw_ink", placement="remote", url=url).score(blank(3))
    assert lines[-1].startswith("digits/raw_ink: 3 samples, 0 missing, ") and lines[-1].endswith(" ms")


def test_a_server_that_is_full_says_so_and_the_client_comes_back():
    said = []
    with serving([("served:Slow", {"seconds": 0.3})], most_waiting=1, log=said.append) as url:
        remote = get_reward("served:Slow", placement="remote", url=url, batch_size=1, backoff_s=0.2)
        scores = remote.score(Samples(["x"] * 2, texts=["", ""]))
        assert scores.values[:, 0].tolist() == [7, 7]
        assert any("429" in line for line in said)


def test_nothing_to_serve_and_an_address_in_use(url):
    with pytest.raises(ConfigError, match="nothing to serve"):
        build_served([])
    with (
        pytest.raises(ConfigError, match="address of the server"),
        serving([("jpeg", {})], port=int(url.rpartition(":")[2])),
    ):
        pass
    assert len(build_served([("digits/raw_ink", {}), ("digits/raw_ink", {})])) == 1


def test_a_file_names_what_is_served(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "steps: 3\nrewards:\n- {name: jpeg, weight: 2}\n"
        "- {name: digits/ink_band, args: {placement: remote, url: 'http://x:1', retries: 1, split: evaluator}}\n"
    )
    assert asked_of(load_rewards(path)) == [("jpeg", {}), ("digits/ink_band", {"split": "evaluator"})]
    path.write_text("rewards: [{name: jpeg, arg: {}}]")
    with pytest.raises(ConfigError, match="Did you mean 'rewards.0.args'"):
        load_rewards(path)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_serves_says_where_and_ends_in_peace(tmp_path):
    config = tmp_path / "r.yaml"
    config.write_text("rewards: [{name: 'served:Slow', args: {seconds: 1.0}}]")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli", "rewards", "serve", "--reward", "digits/raw_ink", "--config", str(config),
         "--port", "0", "--json", "-"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["rewards"] == ["digits/raw_ink", "served:Slow"]
        remote = get_reward("digits/raw_ink", placement="remote", url=ready["url"])
        assert remote.score(blank(2)).values[:, 0].tolist() == [0, 0]
        slow, found = get_reward("served:Slow", placement="remote", url=ready["url"]), []
        asking = threading.Thread(target=lambda: found.append(slow.score(Samples(["x"], texts=[""]))))
        asking.start()
        while "asked" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert found[0].values.tolist() == [[7.0]]
        assert process.wait(timeout=20) == 0
        log = process.stderr.read()
        assert "align: served:Slow: 1 samples, 0 missing, " in log and "Traceback" not in log
    finally:
        process.kill()


def test_the_command_refuses_in_one_sentence(capsys):
    from align.cli import main

    for arguments, sentence in (
        (["--reward", "digits/raw_inc"], "Did you mean 'digits/raw_ink'?"),
        ([], "nothing to serve"),
        (["--reward", "jpeg", "--port", "99999"], "address"),
        (["--config", "nope.yaml"], "no such file"),
    ):
        assert main(["rewards", "serve", *arguments]) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1
    assert main(["rewards", "serve", "--reward", "jpeg", "--dry-run"]) == 0
    assert "would serve" in capsys.readouterr().out
