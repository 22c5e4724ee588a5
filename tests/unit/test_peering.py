"""`align peering`: known tastes recovered from ratings and from rankings, answers looked up, and who wins where."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from align.cli import main
from align.config import load_config
from align.errors import ConfigError, DataError
from align.feedback.consistency import consistency
from align.feedback.events import FeedbackEvent, Item
from align.feedback.protocol_world import ProtocolWorld
from align.feedback.store import Store
from align.feedback.views import joined_of
from align.peering_config import fit_config_of
from align.reports.peering import reading, write_page
from rewards import embeddings
from rewards.fit_data import load_data
from tests.people import write_rows
from trainers.peering import Outputs, ask_events, peer, pick, play, write_picks


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")


SMALL = (
    "steps=50",
    "optimizer.lr=0.02",
    "world.prompts=70",
    "world.responses=4",
    "world.selected_prompts=60",
    "world.candidates=7",
)


def config(*overrides: str):
    return load_config("peering/simulated", [*SMALL, *overrides])


# --- the whole of it on a world whose tastes are known ----------------------------------------------


def test_each_reward_finds_its_own_taste_and_wins_under_its_own_protocol(tmp_path):
    result = peer(config(), tmp_path / "run")
    found, selection = result.found, result.found["selection"]
    recovery = selection["recovery"]
    for kind, other in (("ratings", "rankings"), ("rankings", "ratings")):
        assert recovery[kind][kind] > 0.9 > 0.75 > recovery[kind][other]
        own, others = found["accuracy"][kind][kind], found["accuracy"][kind][other]
        assert own["ci"][0] > others["without_ties"] and own["n"] > 200
        truth = selection["truth"]
        assert truth[kind][kind]["ci_low"] > truth[other][kind]["mean"] > truth["random"][kind]["mean"]
        gain = selection["against_baseline"][kind]["beyond_random"][kind]
        assert gain["ci_low"] > 0 and gain["n"] == 60
    duel = selection["ratings_against_rankings"]
    assert duel["ratings"]["wilson"][0] > 0.5 > duel["rankings"]["wilson"][1]
    assert duel["ratings"]["n"] == duel["rankings"]["n"] == round(60 * (1 - selection["overlap"]))
    table = selection["against_baseline"]
    assert all(row[p]["n"] == row[p]["win"] + row[p]["tie"] + row[p]["loss"] == 60 for row in table.values() for p in duel
               if p != "shared")  # fmt: skip
    # half of the disagreement of this world is contradiction, and it is counted apart from ties
    c = found["consistency"]
    strict = np.array(c["matrix"])[1:, 1:]
    assert c["flips"] == strict[0, 1] + strict[1, 0] > 0.15 * c["both_strict"]
    assert c["n"] == c["consistent"] + c["flips"] + c["rating_tie_strict_ranking"] + c["strict_rating_ranking_tie"]
    picks = [json.loads(line) for line in (tmp_path / "run" / "picks.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in picks} == {f"Question {p}" for p in range(70, 130)}

    page = write_page(tmp_path / "run").read_text()
    assert "Each reward wins under the protocol it was fitted to" in page and page.count("<svg") == 7
    assert peer(config(), tmp_path / "run").found == found, "called again, it goes on and finds the same"


@pytest.mark.slow
def test_where_both_protocols_share_a_taste_neither_reward_wins(tmp_path):
    same = ("world.density_in_rankings=0.8", "seed=1")
    found = peer(config(*same), tmp_path / "run").found
    assert found["selection"]["recovery"]["rankings"]["ratings"] > 0.9
    duel = found["selection"]["ratings_against_rankings"]
    for protocol in ("ratings", "rankings"):
        low, high = duel[protocol]["wilson"]
        assert low < 0.5 < high
    assert found["consistency"]["flip_rate"] < 0.15
    said = " ".join(reading(found))
    assert "do not both tell the rewards apart" in said and "neither wins" in said


# --- a store of one's own ---------------------------------------------------------------------------


def own_store(folder, world: ProtocolWorld, prompts: int = 50, each: int = 4):
    items = world.answers(prompts, each)
    with Store.open(folder / "own.db") as store:
        store.add(items, world.events(items))
    return items


def test_a_store_of_ones_own_is_judged_by_its_own_answers_on_held_out_prompts(tmp_path):
    world = ProtocolWorld(seed=5)
    items = own_store(tmp_path, world)
    mine = config(f"data.paths=[{tmp_path / 'own.db'}]", "steps=40")
    found = peer(mine, tmp_path / "run").found
    selection = found["selection"]
    prompts = {json.loads(line)["prompt"] for line in (tmp_path / "run" / "picks.jsonl").read_text().splitlines()}
    assert selection["prompts"] == len(prompts) and 8 < len(prompts) < 25 and selection["of_each"] == [4, 4]
    assert "truth" not in selection and "recovery" not in selection
    for row in selection["against_baseline"].values():
        assert row["ratings"]["n"] == row["rankings"]["n"] == len(prompts)
    for kind in ("ratings", "rankings"):
        assert selection["against_baseline"][kind][kind]["rate"] > 0.6

    # candidates nobody has judged: picked, and said to be waiting
    new = world.answers(12, 6, "mine", first=200)
    old = [item for item in items if item.prompt not in prompts][:5]
    rows = [{"prompt": i.prompt, "completion": i.response, "policy": "mine"} for i in [*new, *old]]
    write_rows(tmp_path / "c.jsonl", rows)
    asking = ["steps=3", f"data.paths=[{tmp_path / 'own.db'}]", f"selection.candidates={tmp_path / 'c.jsonl'}"]
    waiting = peer(config(*asking), tmp_path / "waiting").found
    assert waiting["selection"]["prompts"] == 12, "the prompt that was fitted to is left out"
    assert waiting["selection"]["against_baseline"]["ratings"]["ratings"]["n"] == 0
    assert " ".join(reading(waiting)).count("picks.jsonl holds what is to be asked") == 2
    assert "no answers yet" in write_page(tmp_path / "waiting").read_text()

    # and once they are answered, judged
    with Store.open(tmp_path / "later.db") as store:
        store.add(new, world.events(new))
    answered = peer(config(*asking, f"selection.answers=[{tmp_path / 'later.db'}]"), tmp_path / "answered").found
    assert answered["selection"]["against_baseline"]["random"]["rankings"]["n"] == 12
    with pytest.raises(DataError, match="nothing to select from"):
        peer(config(*asking, "selection.baseline=yours"), tmp_path / "nobody")


def test_one_protocol_alone_is_refused(tmp_path):
    items = own_store(tmp_path, ProtocolWorld(seed=5), 20, 3)
    with Store.open(tmp_path / "own.db") as store:
        rated = [e for e in store.current() if e.kind == "ordinal"]
    with Store.open(tmp_path / "rated.db") as store:
        store.add(items, rated)
    with pytest.raises(DataError, match="no rankings.*120 ratings"):
        peer(config(f"data.paths=[{tmp_path / 'rated.db'}]"), tmp_path / "run")
    assert not (tmp_path / "run" / "ratings").exists(), "nothing is fitted first"


def test_ratings_of_several_keys_are_refused_before_anything_is_fitted(tmp_path):
    items = own_store(tmp_path, ProtocolWorld(seed=5), 20, 3)
    with Store.open(tmp_path / "own.db") as store:
        rated = [e for e in store.current() if e.kind == "ordinal"]
        store.add(items, [replace(e, key="kindness", identifier="", id="") for e in rated])
    paths = f"data.paths=[{tmp_path / 'own.db'}]"
    with pytest.raises(DataError, match=r"120 have the key kindness, 120 have the key quality.*data.ratings_key"):
        peer(config(paths), tmp_path / "run")
    assert not (tmp_path / "run" / "ratings").exists(), "nothing is fitted first"
    told = fit_config_of(config(paths, "data.key=quality", "data.ratings_key=kindness"), "both", (paths[12:-1],))
    data = load_data(told.data.paths, told.data)
    assert data.counts()["rating"] == 120 and data.left_out["of other signals"] == 120 and data.counts()["comparison"]


def test_a_fit_can_be_told_which_answers_it_reads(tmp_path):
    own_store(tmp_path, ProtocolWorld(seed=5), 10, 3)
    mine = config()
    for name, kinds in (("ratings", {"rating"}), ("rankings", {"comparison"}), ("both", {"rating", "comparison"})):
        told = fit_config_of(mine, name, (str(tmp_path / "own.db"),))
        assert set(load_data(told.data.paths, told.data).counts()) == kinds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.paths=[simulated, a.db]"], "stands alone"),
        (["selection.candidates=c.jsonl"], "its own candidates"),
        (["model.backbone=pixels"], "data.media"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        peer(config(*overrides), tmp_path / "run")


# --- parts by hand ----------------------------------------------------------------------------------


def test_answers_are_looked_up_by_hand():
    def said(kind, items, value, **rest):
        return FeedbackEvent(kind, items, value, **rest)

    events = [
        said("ordinal", ("x",), 5, scale=(1, 7), annotator="1"), said("ordinal", ("x",), 6, scale=(1, 7), annotator="2"),
        said("ordinal", ("y",), 5, scale=(1, 7), annotator="1"), said("pairwise", ("y", "x"), "a", annotator="1"),
        said("pairwise", ("x", "y"), "tie", annotator="2"), said("ranking", ("x", "y", "z"), (3, 1, 2), annotator="3"),
        said("ordinal", ("y",), 7, scale=(1, 7), annotator="4", key="other"),
    ]  # fmt: skip
    ask = ask_events(events, "quality")
    assert ask("x", "y") == (1.0, pytest.approx((0 + 0.5 + 0) / 3)), "5.5 beats 5; lost, tied, lost"
    assert ask("y", "x") == (0.0, pytest.approx((1 + 0.5 + 1) / 3))
    assert ask("x", "z") == (None, 0.0) and ask("x", "q") == (None, None)
    assert ask_events(events, None)("x", "y")[0] == 0.0, "with every key y is rated 6"


def test_picks_leave_the_baseline_out_and_break_ties_by_the_first():
    items = [Item("p", f"answer {i}", metadata={"policy": "old" if i == 2 else "new"}) for i in range(5)]
    few = [Item("q", f"answer {i}", metadata={"policy": "old"}) for i in range(2)]
    pool = Outputs({item.id: item for item in [*items, *few]})
    scores = {"ratings": np.array([1.0, 3, 9, 3, 2, 0, 0]), "rankings": np.array([np.nan, 0, 9, 1, 1, 0, 0])}
    told = config("selection.baseline=old")
    found = pick(pool, scores, told)
    assert list(found) == [items[0].prompt_id]
    chosen = found[items[0].prompt_id]
    assert [chosen[k] for k in ("baseline", "ratings", "rankings")] == [items[i].id for i in (2, 1, 3)]
    assert chosen["random"] in [items[i].id for i in (0, 1, 3, 4)]
    assert pick(pool, scores, told) == found

    def ask(a, b):
        return (1.0, 0.0) if a == items[1].id else (0.5, None)

    table = play(found, ask)["against_baseline"]
    assert table["ratings"]["ratings"]["rate"] == 1 and table["ratings"]["rankings"]["rate"] == 0
    assert table["rankings"]["ratings"]["rate"] == 0.5 and table["rankings"]["rankings"]["n"] == 0


def test_the_world_answers_as_it_says():
    world = ProtocolWorld(seed=3, first_place=0.0, rating_noise=0.0, severity=0.0)
    a, b = (item.id for item in world.answers(1, 2))
    world.truth[a] = replace(world.truth[a], rating=2.0, ranking=0.5)
    world.truth[b] = replace(world.truth[b], rating=-0.7, ranking=0.0)
    assert {world.rate(a, 0) for _ in range(9)} == {6} and {world.rate(b, 1) for _ in range(9)} == {3}
    said = [world.compare(a, b) for _ in range(4000)]
    wins = 1 / (1 + np.exp(-1.0))  # of one order; 2 (0.5 - 0) nats
    for word, share in (("a", wins**2), ("b", (1 - wins) ** 2), ("tie", 2 * wins * (1 - wins))):
        assert said.count(word) / 4000 == pytest.approx(share, abs=0.025)
    world.first_place = 40.0
    assert world.compare(a, b) == "tie", "whoever always takes the first contradicts themselves"


def test_every_pair_is_rated_and_ranked_by_the_same_people():
    world = ProtocolWorld(seed=0)
    items = world.answers(20, 4)
    report = consistency(joined_of(world.events(items), {i.id: i for i in items}))
    assert report["n"] == 20 * 6 * 2 and report["skipped"] == 0 and report["notes"]["joined_by"] == "annotator"
    assert report["ranking_ties_by_position_swap"] == sum(row[0] for row in report["matrix"])


def test_the_verb_plans_runs_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["peering", "peering/simulated", "--dry-run"]) == 0
    assert "17 each for 120 new prompts" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert main(["check", "peering/simulated"]) == 0 and "one of rankings" in capsys.readouterr().out
    assert main(["train", "peering/simulated"]) == 2 and "align peering" in capsys.readouterr().err
    assert main(["peering", "fit/thumbs"]) == 2 and "'fit'" in capsys.readouterr().err
    own_store(tmp_path, ProtocolWorld(seed=5), 20, 3)
    assert main(["peering", "peering/simulated", "data.paths=[own.db]", "--dry-run"]) == 0
    assert "held out" in capsys.readouterr().out
    small = [*SMALL, "steps=5", "world.selected_prompts=4"]
    assert main(["peering", "peering/simulated", *small, "--out", "run", "--json", "r.json"]) == 0
    assert "Judged by ratings" in capsys.readouterr().out and (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "complete"
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", "run"]) == 0 and (tmp_path / "run" / "report.html").is_file()
    assert main(["resume", "run"]) == 0 and "Judged by rankings" in capsys.readouterr().out


def test_picked_images_come_along_and_keep_their_ids(tmp_path):
    """A path out of the run's folder is left as it is, and nothing is written there."""
    there, run = tmp_path / "candidates", tmp_path / "run"
    (there / "images").mkdir(parents=True)
    run.mkdir()
    items = [Item("a cat", f"{name}.png", media="image") for name in ("images/a", "images/b", "../outside")]
    for name in ("a", "b", "../../outside"):
        (there / "images" / f"{name}.png").write_bytes(name.encode())
    (tmp_path / "outside.png").rename(tmp_path / "kept.png")
    pool = Outputs({item.id: item for item in items}, {item.id: there for item in items})
    write_picks(
        run / "picks.jsonl", pool,
        {"a cat": {"ratings": items[0].id, "rankings": items[1].id}, "the cat": {"ratings": items[2].id}},
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "picks.jsonl").read_text().splitlines()]
    assert [Item(r["prompt"], r["image"], media="image").id for r in rows] == [item.id for item in items]
    assert [(run / r["image"]).read_bytes() for r in rows[:2]] == [b"a", b"b"]
    assert not (tmp_path / "outside.png").exists()
