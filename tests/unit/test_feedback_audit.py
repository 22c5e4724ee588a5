"""Each audit finds what a simulated log was made to contain, and finds nothing where there is nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.cli import main
from align.errors import DataError
from align.feedback.aggregate import fit
from align.feedback.agreement import all_coefficients, answers_of_table
from align.feedback.audit import (
    annotator_table,
    bursts,
    concentration,
    coordinated,
    coverage,
    duplicate_texts,
    missing_not_at_random,
    rates_by,
)
from align.feedback.bias import bias_report, choice_bias, has_emoji, has_list, says_its_name
from align.feedback.events import FeedbackEvent, Item
from align.feedback.exchange import import_file
from align.feedback.signals import SignalGates, require_trainable, select_signal
from align.feedback.simulate import Simulation, SimulationConfig, simulate, simulate_reactions
from align.feedback.store import Store
from align.feedback.views import Shown, answers_of, comparisons_of, shown_of

WORLD = SimulationConfig(users=150, shown_per_user=30, pairs_per_rater=150, prompts=50)


@pytest.fixture(scope="module")
def clean() -> Simulation:
    return simulate(WORLD)


@pytest.fixture(scope="module")
def dirty() -> Simulation:
    strange = {"annoyed": 1.2, "position_slope": 0.4, "first_place": 0.8, "constant": 1, "coordinated": 2}
    return simulate(replace(WORLD, **strange))


def shown(world: Simulation) -> Shown:
    return shown_of(world.events, world.items, "thumb", "binary")


def quality(world: Simulation, entries: Shown) -> np.ndarray:
    return np.array([world.quality[item] for item in entries.item_N])


def test_the_same_config_gives_the_same_log(clean: Simulation):
    assert simulate(WORLD).events == clean.events and simulate(replace(WORLD, seed=1)).events != clean.events


# --- coverage, rates, silence -----------------------------------------------------------------------------------


def tiny() -> tuple[dict[str, Item], list[FeedbackEvent]]:
    items = {item.id: item for item in (Item("p", word) for word in "abcd")}
    a, b, c, d = items
    about = {"key": "shown", "exposure": "shown"}
    events = [
        FeedbackEvent("exposure", (i,), annotator=u, **about) for u, i in (("u", a), ("u", b), ("v", a), ("v", c))
    ]
    events += [FeedbackEvent("binary", (a,), True, key="thumb", annotator="u")]
    events += [FeedbackEvent("binary", (c,), False, key="thumb", annotator="v")]
    events += [FeedbackEvent("binary", (d,), True, key="thumb", annotator="w")]
    events += [FeedbackEvent("binary", (d,), True, key="thumb", annotator="x", exposure="shown")]
    return items, events


def test_users_react_to_items_that_are_there_already():
    quality = {f"item-{i}": 3.0 if i % 2 else -3.0 for i in range(8)}
    by_prompt = [[f"item-{i}" for i in range(4)], [f"item-{i}" for i in range(4, 8)]]
    world = SimulationConfig(users=50, shown_per_user=20, reaction_rate=0.3, user_spread=0.1)
    events, effects = simulate_reactions(by_prompt, quality, world)
    assert (events, effects) == simulate_reactions(by_prompt, quality, world) and len(effects) == 50
    seen = [event for event in events if event.kind == "exposure"]
    thumbs = [event for event in events if event.kind == "binary"]
    assert len(seen) == 1000 and len(seen) + len(thumbs) == len(events) and 200 < len(thumbs) < 400
    assert {event.items[0] for event in seen} == set(quality)
    assert all(event.value == (quality[event.items[0]] > 0) for event in thumbs), "six standard deviations apart"


def test_rates_are_of_what_was_shown_and_silence_is_not_a_dislike():
    items, events = tiny()
    found = coverage(shown_of(events, items, "thumb", "binary"))
    assert (found["n_shown"], found["n_reacted"], found["unknown"]) == (5, 3, 1)
    assert (found["coverage"], found["base_rate"], found["positive_share"]) == (0.6, 0.4, pytest.approx(2 / 3))
    again = FeedbackEvent(
        "binary", (events[0].items[0],), True, key="thumb", annotator="u", exposure="shown", session="2"
    )
    found = coverage(shown_of([*events, again], items, "thumb", "binary"))
    assert (found["n_shown"], found["n_reacted"]) == (5, 3), "the showing without a session may be this one"
    first = replace(events[0], session="1", identifier="")
    found = coverage(shown_of([first, again], items, "thumb", "binary"))
    assert (found["n_shown"], found["n_reacted"]) == (2, 1), "two sessions are two showings"


def test_a_reaction_of_another_name_is_another_signal():
    items, events = tiny()
    events = [e for e in events if e.kind == "exposure"]
    for name, user, item in (("love", "u", 0), ("wow", "v", 2)):
        events.append(FeedbackEvent("reaction", (list(items)[item],), name, key="r", annotator=user))
    assert coverage(shown_of(events, items, "r", "reaction", positive="love"))["n_reacted"] == 1


def test_screens_of_comparisons_are_no_exposures_of_thumbs():
    items, events = tiny()
    a, b, *_ = items
    screen = {"annotator": "z", "session": "s1"}
    events += [
        FeedbackEvent("exposure", (a, b), key="shown", **screen),
        FeedbackEvent("pairwise", (a, b), "a", **screen),
    ]
    assert coverage(shown_of(events, items, "thumb", "binary"))["n_shown"] == 5


def test_positions_and_models_are_found(clean: Simulation, dirty: Simulation):
    rates = [row["coverage"] for row in rates_by(shown(dirty), "position")]
    assert len(rates) == 4 and rates == sorted(rates, reverse=True) and rates[0] > 1.7 * rates[3]
    flat = [row["coverage"] for row in rates_by(shown(clean), "position")]
    assert max(flat) < 1.4 * min(flat)
    assert [row["group"] for row in rates_by(shown(clean), "policy")] == [f"model-{m}" for m in range(4)]
    assert len(rates_by(shown(clean), "time")) == 8 and len(rates_by(shown(clean), "user")) == 50


def test_silence_that_depends_on_quality_is_found_and_random_silence_is_not(clean: Simulation, dirty: Simulation):
    found = missing_not_at_random(shown(dirty), quality(dirty, shown(dirty)), permutations=300)
    assert found["verdict"] == "missing not at random" and found["p"] < 0.01 and found["monotone_sign"]
    assert found["bins"][0]["coverage"] > 2 * found["bins"][-1]["coverage"]
    assert (
        missing_not_at_random(shown(clean), quality(clean, shown(clean)), permutations=300)["verdict"] == "no evidence"
    )
    few = replace(shown(clean), value_N=np.full(len(shown(clean).value_N), np.nan))
    assert missing_not_at_random(few, quality(clean, few))["verdict"] == "insufficient"


def test_the_permutation_test_keeps_its_level():
    """Over worlds where silence is random the p-values are uniform: about one in five below 0.2."""
    worlds = [simulate(replace(WORLD, seed=s, raters=0, users=40)) for s in range(25)]
    p = [missing_not_at_random(shown(w), quality(w, shown(w)), permutations=100)["p"] for w in worlds]
    assert 0 <= sum(v < 0.2 for v in p) <= 11 and 0.3 < np.mean(p) < 0.7


# --- bias ---------------------------------------------------------------------------------------------------------


def test_the_first_place_is_found_and_measured(clean: Simulation, dirty: Simulation):
    low, _ = bias_report(dirty.events, dirty.items)["comparisons"]["p_first"]["ci"]
    assert low > 0.5
    even = bias_report(clean.events, clean.items)["comparisons"]["p_first"]
    assert abs(even["share"] - 0.5) < 4 * (0.25 / even["n"]) ** 0.5
    found = fit(comparisons_of(dirty.events, dirty.items, by="item"), "davidson", position=True, prior=0.3)
    assert abs(found.intercept - 0.8) < 4 * found.intercept_error and found.intercept_error < 0.15
    truth = np.array([dirty.quality[name] for name in found.names])
    assert np.corrcoef(truth, found.strengths)[0, 1] > 0.75


def test_choice_bias_by_hand():
    pairs = [
        ("long text", "short", 1, "p"),
        ("x", "longer", 0, "q"),
        ("- a\n- b", "plain text", -1, "r"),
        ("same", "size", 1, "s"),
    ]
    found = choice_bias(pairs, draws=50)
    assert (found["n"], found["ties"], found["tie_rate"]) == (4, 1, 0.25)
    assert (found["p_longer"]["n"], found["p_longer"]["share"]) == (3, pytest.approx(2.5 / 3))
    assert (found["p_first"]["n"], found["p_first"]["share"]) == (3, pytest.approx(2 / 3))
    assert (found["p_list"]["n"], found["p_list"]["share"], found["p_emoji"]["n"]) == (1, 0.0, 0)
    assert found["winner_length"] == pytest.approx((9 + 10 + 4) / 3)
    assert (found["winner_list_rate"], found["loser_list_rate"]) == (0, pytest.approx(1 / 3))


def test_words_for_lists_emoji_and_names():
    assert has_list("1. a\n2) b") and has_list(" - a\n * b") and not has_list("- a") and not has_list("2.5 and 3.5")
    assert has_emoji("fine 🙂") and has_emoji("❤") and not has_emoji("plain, naïve 中文")
    assert says_its_name("As an AI language model, I") and says_its_name("I was trained by OpenAI")
    assert not says_its_name("The llama is an animal; Claude Monet painted.")


# --- annotators -----------------------------------------------------------------------------------------------------


def test_severity_is_recovered(clean: Simulation):
    table = annotator_table(answers_of(clean.events, clean.items, "quality", "ordinal"))
    found = np.array([row["severity"] for row in table])
    truth = np.array([clean.severity[row["annotator"]] for row in table])
    truth = truth - (truth.sum() - truth) / (len(truth) - 1)
    assert np.abs(found - truth).max() < 0.4 and np.corrcoef(found, truth)[0, 1] > 0.95
    assert not any("constant" in row["flags"] for row in table)


@pytest.mark.parametrize(
    ("offsets", "severity", "flagged"),
    [
        ([0, 0, 0, 2], [-2 / 3, -2 / 3, -2 / 3, 2], ["", "", "", "lenient"]),  # one outlier moves everybody's mean
        ([0, 0, -2], [1, 1, -2], ["", "", "severe"]),
        ([0, 2], [-2, 2], ["severe", "lenient"]),  # of two, either may be
        ([0, 0, 0, 1, 1], [-0.5, -0.5, -0.5, 0.75, 0.75], ["", "", "", "", ""]),  # camps: neither is most
    ],
)
def test_severity_flags_who_is_far_from_most_others(offsets: list[int], severity: list[float], flagged: list[str]):
    labels = [[1 + unit % 5 + offset + 2 for offset in offsets] for unit in range(40)]
    names = [f"r{r}" for r in range(len(offsets))]
    table = annotator_table(answers_of_table(labels, names, categories=range(1, 10), ordered=True))
    assert [row["severity"] for row in table] == pytest.approx(severity)
    assert [",".join(row["flags"]) for row in table] == flagged


def test_constant_and_coordinated_raters_are_named_and_nobody_else(dirty: Simulation, clean: Simulation):
    answers = answers_of(dirty.events, dirty.items, "quality", "ordinal")
    flagged = [row["annotator"] for row in annotator_table(answers) if "constant" in row["flags"]]
    assert flagged == ["constant-0"]
    assert [row["annotators"] for row in coordinated(answers)] == [["copy-0", "copy-1"]]
    assert coordinated(answers_of(clean.events, clean.items, "quality", "ordinal")) == []


def test_constant_where_everybody_says_the_same_is_no_flag():
    items = [Item("p", str(i)) for i in range(40)]
    events = [FeedbackEvent("binary", (i.id,), True, annotator=a) for i in items for a in "abc"]
    assert not any(
        row["flags"] for row in annotator_table(answers_of(events, {i.id: i for i in items}, "quality", "binary"))
    )


def test_bursts(dirty: Simulation, clean: Simulation):
    assert {row["annotator"] for row in bursts(dirty.events)} == {"constant-0", "copy-0", "copy-1"}
    assert bursts(clean.events) == []
    item = Item("p", "x").id
    at = [10_000 + (i if i < 12 else 60) * 500 for i in range(13)]
    events = [FeedbackEvent("ordinal", (item,), 3, key=f"k{t}", scale=(1, 7), annotator="ann", ts=t) for t in at]
    events += [FeedbackEvent("ordinal", (item,), 3, key="other", scale=(1, 7), annotator="ann", ts=t) for t in at]
    (found,) = bursts(events)
    assert (found["n"], found["median_gap_ms"], found["start_ms"]) == (12, 500, 10_000)


def test_an_import_of_rows_without_times_is_no_burst_and_no_period(tmp_path: Path):
    rows = [{"prompt": f"p{i}", "response": "x", "label": i % 2 == 0, "annotator": "ann", "exposure": "shown"}
            for i in range(600)]  # fmt: skip
    rows += [{**rows[0], "prompt": "old", "ts": "2025-01-01"}, {**rows[0], "prompt": "new", "ts": "2025-01-09"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Store.open(tmp_path / "f.db") as store:
        import_file(store, tmp_path / "log.jsonl")
        events, items = list(store.current()), store.items()
        untimed = store.counts()["untimed"]
    assert bursts(events) == [] and untimed == 600
    periods = rates_by(shown_of(events, items, "quality", "binary"), "time", buckets=4)
    assert [row["n_shown"] for row in periods] == [1, 1] and periods[0]["group"] == 1735689600000
    assert rates_by(shown_of(events[:-2], items, "quality", "binary"), "time") == [], (
        "no event with a time is no period"
    )


def test_copied_comments_and_concentration():
    item = Item("p", "x").id
    events = [FeedbackEvent("text", (item,), f"Great  answer{'!' * (n > 2)}", annotator=str(n)) for n in range(5)]
    assert [(row["text"], row["n"]) for row in duplicate_texts(events)] == [("great answer", 3)]
    assert concentration(["a"] * 8 + ["b"] * 2) == 0.8


def test_the_newest_answer_of_an_annotator_counts_and_scales_are_not_mixed():
    item = Item("p", "x")
    about = {"key": "q", "annotator": "ann"}
    events = [FeedbackEvent("ordinal", (item.id,), v, scale=(1, 7), session=str(v), ts=v, **about) for v in (5, 2)]
    answers = answers_of(events, {item.id: item}, "q", "ordinal")
    assert answers.code_N.tolist() == [4] and answers.categories == tuple(range(1, 8))
    with pytest.raises(DataError, match="different scales"):
        answers_of(
            [*events, FeedbackEvent("ordinal", (item.id,), 3, scale=(1, 5), **about)], {item.id: item}, "q", "ordinal"
        )


def test_pairs_agree_whatever_their_order_was():
    a, b = Item("p", "x"), Item("p", "y")
    events = [
        FeedbackEvent("pairwise", (a.id, b.id), "a", annotator="u"),
        FeedbackEvent("pairwise", (b.id, a.id), "b", annotator="v"),
    ]
    events.append(FeedbackEvent("ranking", (a.id, b.id), (1, 2), annotator="w"))
    answers = answers_of(events, {a.id: a, b.id: b}, "quality", "pairwise")
    assert answers.n_units == 1 and len(set(answers.code_N)) == 1 and len(answers.raters) == 2
    assert all_coefficients(answers)["krippendorff_nominal"].reason == "every answer is the same category"


# --- signals --------------------------------------------------------------------------------------------------------


def test_gates(clean: Simulation):
    entries = shown(clean)
    passed = select_signal("thumb", entries, outcome=clean.user_effect, gates=SignalGates(min_reacted=100))
    assert passed.verdict in ("pass", "fail") and passed.n_shown == 4500
    strong = {u: float(np.nansum(entries.value_N[entries.user_N == u])) for u in set(entries.user_N)}
    assert select_signal("thumb", entries, outcome=strong, gates=SignalGates(min_reacted=100)).verdict == "pass"
    unproven = select_signal("thumb", entries, gates=SignalGates(min_reacted=100))
    assert unproven.verdict == "unproven"
    with pytest.raises(DataError, match=r"not to be trained on: outcome is nan, asked interval above 0"):
        require_trainable(unproven)
    require_trainable(unproven, override=True)
    failed = select_signal("thumb", entries, gates=SignalGates(min_reacted=10**6, needs_outcome=False))
    assert failed.verdict == "fail" and [g["gate"] for g in failed.gates if not g["holds"]] == ["n_reacted"]
    noise = {
        u: float(n) for u, n in zip(sorted(clean.user_effect), np.random.default_rng(0).normal(size=150), strict=True)
    }
    assert select_signal("thumb", entries, outcome=noise, gates=SignalGates(min_reacted=100)).verdict == "fail"


def test_one_user_with_half_of_the_reactions_fails_the_gate():
    n = 400
    users = np.array(["bot"] * 300 + [f"u{i}" for i in range(100)], dtype=object)
    ones = np.ones(n)
    entries = Shown(users, users, users, ones.astype(int), ones.astype(int), ones, 0)
    report = select_signal("x", entries, gates=SignalGates(needs_outcome=False))
    assert report.verdict == "fail" and report.by_user_concentration == 0.75


def test_the_audit_verb(tmp_path: Path, dirty: Simulation):
    with Store.open(tmp_path / "s.db") as store:
        store.add(items=dirty.items.values(), events=dirty.events)
    out = tmp_path / "out.json"
    (tmp_path / "p.csv").write_text("policy,offline,online\n" + "".join(f"m{i},{i},{i * i}\n" for i in range(5)))
    verb = ["feedback", "audit", str(tmp_path / "s.db"), "--policies", str(tmp_path / "p.csv"), "--json", str(out)]
    assert main(verb) == 0
    found = json.loads(out.read_text())
    thumb = found["exposures"]["thumb/binary"]
    assert thumb["silence"]["verdict"] == "missing not at random" and thumb["selection"]["verdict"] == "unproven"
    assert found["people"]["coordinated"][0]["annotators"] == ["copy-0", "copy-1"]
    assert found["offline_online"]["verdict"] == "predictive" and found["offline_online"]["k"] == 5
    assert (
        main(["feedback", "agreement", str(tmp_path / "s.db"), "--key", "quality", "--draws", "50", "--json", str(out)])
        == 0
    )
    signals = json.loads(out.read_text())["signals"]
    assert set(signals) == {"quality/ordinal", "quality/pairwise"}
    entry = signals["quality/ordinal"]["coefficients"]["krippendorff_ordinal"]
    assert set(entry) == {"value", "ci", "n_items", "n_raters"} and entry["n_raters"] == 9
