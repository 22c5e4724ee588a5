"""The table of proof: it says what the results say, and the runner keeps, goes on and never drops a failure."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_all"), importlib.import_module("numbers_asked")


def test_the_page_says_what_the_results_say(scripts):
    runner, _ = scripts
    page = runner.PAGE.read_text(encoding="utf-8")
    results = runner.read_results(runner.RESULTS)
    made = runner.written(runner.PAGE, runner.RESULTS)
    assert {path.name for path in made} == {"benchmarks.md", "algorithms.svg", "sparsity_arms.svg"}
    assert runner.stale(made) == [], "run python scripts/bench_all.py --table"
    results["algorithms"]["figures"]["arms"]["window"]["ratio"]["median"] = 0.51
    changed = runner.with_table(page, runner.block(results))
    assert changed != page and "| window | <= .5 | 0.51 | 0.27 to 0.49 | **no** |" in changed
    assert runner.stale({runner.PAGE: changed}) == ["benchmarks.md"]


def test_every_result_is_asked_for_and_has_every_figure_that_is_asked_of_it(scripts):
    runner, numbers = scripts
    results = runner.read_results(runner.RESULTS)
    assert {path.stem for path in runner.RESULTS.iterdir()} == set(results), "a file of no benchmark"
    assert set(numbers.BENCHES) == {a.bench for rows in numbers.ASKED.values() for a in rows if a.bench}
    for asked in (a for rows in numbers.ASKED.values() for a in rows):
        assert asked.why or asked.bench, asked
        if "error" not in results.get(asked.bench, {"error": ""}):
            figures = results[asked.bench]["figures"]
            assert numbers.find(figures, asked.key), asked
            assert not asked.of or numbers.find(figures, asked.of), asked
    for name, result in results.items():
        assert not re.search(r"/tmp|/home|/root", json.dumps(result)), name


def test_commands_name_scripts_tests_and_flags_that_are_there(scripts):
    for name, bench in scripts[1].BENCHES.items():
        words = shlex.split(f"{bench.command} {bench.quick}")
        if words[1] == "pytest":
            assert all((ROOT / word).is_file() for word in words if word.startswith("tests/")), name
            continue
        file = ROOT / (words[0] if words[0] != "-m" else words[1].replace(".", "/") + ".py")
        source = file.read_text(encoding="utf-8")
        flags = [word for word in words if re.fullmatch(r"--[a-z-]+", word)]
        allowed = {"--users", "--images"} if name == "demo" else set()  # handed on to `align demo`
        assert [f for f in flags if f not in allowed and f'"{f}"' not in source] == [], name


def test_values_under_a_key(scripts):
    find = scripts[1].find
    figures = {"a": {"x": {"n": 3, "m": 2}, "y": {"n": 1, "m": 4}, "size": 9}, "list": [5, 6], "no": None, "yes": True}
    assert find(figures, "a.x.n") == [3.0] and find(figures, "list.1") == [6.0]
    assert find(figures, "a.*.n") == [3.0, 1.0] and find(figures, "a.*.n - a.*.m") == [1.0, -3.0]
    assert find(figures, "a.*.n / a.*.m") == [1.5, 0.25]
    assert find(figures, "list") == [2.0] and find(figures, "yes") == [1.0], "a list counts as its length"
    assert find(figures, "no") == find(figures, "b.c") == find(figures, "list.7") == []


def test_bars(scripts):
    _, numbers = scripts
    assert numbers.meets(0.9, ">= .80 and <= .97") and not numbers.meets(0.98, ">= .80 and <= .97")
    assert numbers.meets(19, ">= 19 of 20") and not numbers.meets(18, ">= 19 of 20")
    assert numbers.meets(1e-6, "<= 1e-6") and not numbers.meets(0, "> 0") and numbers.meets(-0.5, ">= -1")
    assert numbers.worst([1, 5, 3], "<= 4") == 5 and numbers.worst([1, 5, 3], ">= 2") == 1
    assert numbers.worst([0, -2, 1], "== 0") == -2 and numbers.worst([1, 5, 3], "") == 3


def test_rows(scripts):
    _, numbers = scripts
    asked = numbers.Asked("x", "<= 2", "step", "a", ".1f")

    def row(asked=asked, **result):
        return numbers.row(asked, {"step": result} if result else {})

    run = "[step](benchmarks/step.json)"
    assert row(figures={"a": 1, "a_spread": [0.5, 3]}) == f"| x | <= 2 | 1.0 | 0.5 to 3.0 | yes | {run} |"
    assert row(figures={"a": 3}) == f"| x | <= 2 | 3.0 |  | **no** | {run} |"
    assert row(figures={"a": 3}, error="killed").endswith(f"**no** | {run}, cut short |")
    assert row(error="ValueError: no") == f"| x | <= 2 | failed: ValueError: no | | no | {run} |"
    assert row(figures={"b": 1}) == f"| x | <= 2 | failed: no such figure | | no | {run} |"
    assert row() == "| x | <= 2 | not measured here: `--only step` takes 2 min | | | |"
    counted = numbers.Asked("x", "== 0", "step", "lost", "d", "all", "saves")
    assert row(counted, figures={"lost": [], "all": 1200}) == f"| x | == 0 | 0 of 1,200 saves |  | yes | {run} |"
    worst = numbers.Asked("x", "", "step", "s.*.v", why="note")
    assert row(worst, figures={"s": {"a": {"v": 1}, "b": {"v": 2}, "c": {"v": 9}}}) == (
        f"| x | reported | 2 (note) | 1 to 9 |  | {run} |"
    )
    assert row(numbers.Asked("x", "> 1", "", why="no GPU")) == "| x | > 1 | not measured here: no GPU | | | |"
    before = numbers.Asked("x", "> 1", "step", "a", before=("2", "run of a day"))
    assert row(before) == "| x | > 1 | 2 | | | run of a day |"


def test_a_failure_is_kept_and_the_rest_run_and_a_sitting_goes_on(scripts, tmp_path, capsys):
    runner, numbers = scripts
    bench = numbers.Bench
    counted = tmp_path / "counted"
    ok = f"-c \"import pathlib; p = pathlib.Path('{counted}'); p.open('a').write('x'); print('log'); print('{{{{\\\"a\\\": 1}}}}')\""
    benches = {
        "first": bench("-c \"raise ValueError('on | purpose')\"", 1),
        "second": bench(ok, 2),
        "third": bench("-c pass", 1, needs="gpu"),
        "silent": bench("-c \"print('no figures')\"", 1),
    }
    runner.BENCHES.update(benches)
    try:
        wrong = runner.run_all(benches, tmp_path / "results", tmp_path / "work")
        assert wrong == {"first": "ValueError: on / purpose", "silent": "no figures"}
        kept = runner.read_results(tmp_path / "results")
        assert (
            kept["first"]["error"] == wrong["first"] and kept["first"]["exit"] == 1 and "figures" not in kept["first"]
        )
        assert kept["second"]["figures"] == {"a": 1} and kept["second"]["versions"]["torch"]
        assert len(kept["second"]["load"]) == 2 and kept["second"]["machine"]["platform"] == "Linux x86_64"
        assert "third" not in kept and "[3/4] third: not run, needs a GPU" in capsys.readouterr().err

        again = {name: benches[name] for name in ("first", "second")}
        runner.run_all(again, tmp_path / "results", tmp_path / "work")
        said = capsys.readouterr().err
        assert "second: has a result" in said and "first: 0 s, failed" in said and counted.read_text() == "x"
        runner.run_all({"second": benches["second"]}, tmp_path / "results", tmp_path / "work", again=True)
        assert counted.read_text() == "xx"
        file = tmp_path / "results" / "second.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"versions": {"torch": "1.0"}}))
        runner.run_all({"second": benches["second"]}, tmp_path / "results", tmp_path / "work")
        assert counted.read_text() == "xxx", "figures of other versions are not these"
    finally:
        for name in benches:
            del runner.BENCHES[name]


def test_tests_as_figures(scripts, tmp_path):
    runner, numbers = scripts
    file = tmp_path / "test_small.py"
    file.write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('cell', 'kto')\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_out(): pass\n"
    )
    found = runner.run(numbers.Bench(f"-m pytest -p no:cacheprovider -c /dev/null {file}", 1), tmp_path / "work")
    assert found["figures"] == {
        "tests": 2, "failed": 1, "skipped": 1, "failures": ["test_bad"], "told": [{"test": "test_good", "cell": "kto"}],
    }  # fmt: skip
    assert "error" not in found and found["exit"] == 1, "what failed is the figure"
    junit = tmp_path / "skipped.xml"
    junit.write_text("<testsuites><testsuite><testcase name='a'><skipped/></testcase></testsuite></testsuites>")
    with pytest.raises(ValueError, match="1 tests were skipped, and no other was there"):
        runner.pytest_figures(junit)


def test_what_hangs_is_stopped_with_all_it_started(scripts, tmp_path):
    inner = f"import time; time.sleep(1); open({str(tmp_path / 'alive')!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    code, _, said = scripts[0]._call([sys.executable, "-c", outer], 0.5)
    assert code == -9 and said.endswith("stopped after 0 minutes")
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()


def test_output_of_an_earlier_run_is_taken_with_its_date(scripts, tmp_path):
    runner, _ = scripts
    file = tmp_path / "said.txt"
    file.write_text('step 1\n{"broken": \n{\n "kills": 3,\n "versions": {"torch": "2"}, "machine": {"platform": '
                    '"Linux-6.1-x86_64-with-glibc2.36"}, "command": ["a"]\n}\nrc 0\n')  # fmt: skip
    runner.take("stops", file, tmp_path / "results")
    kept = runner.read_results(tmp_path / "results")["stops"]
    assert kept["figures"] == {"kills": 3} and kept["machine"]["platform"] == "Linux x86_64" and kept["taken"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"]) and kept["command"].endswith("stops --count 100")
    file.write_text("nothing\n")
    with pytest.raises(ValueError, match="no JSON object"):
        runner.take("stops", file, tmp_path / "results")


def test_what_is_left(scripts):
    minutes = {"a": 2.0, "b": 3.0}
    assert scripts[0].remaining("ab", 0, 0, minutes) == 5
    assert scripts[0].remaining("b", 2, 6, minutes) == 9, "what was run took three times what was declared"


def test_a_page_without_its_place_is_refused(scripts):
    with pytest.raises(ValueError, match="the page lacks the lines"):
        scripts[0].with_table("# Benchmarks\n", "table")


def test_the_list_names_every_benchmark(scripts):
    command = [sys.executable, "scripts/bench_all.py", "--list"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    assert [line.split()[0] for line in said.stdout.splitlines()[:-1]] == list(scripts[1].BENCHES)
