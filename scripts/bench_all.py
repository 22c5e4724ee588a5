"""Every number the issues ask for, one command: runs the benchmarks and writes the table of docs/benchmarks.md.

    python scripts/bench_all.py                         # all that this machine can, and the table as they come
    python scripts/bench_all.py --list                  # what there is, what it takes, what has a result
    python scripts/bench_all.py --only step rewards     # some of them
    python scripts/bench_all.py --quick                 # small sizes, to show that all runs; no figures are kept
    python scripts/bench_all.py --take step FILE        # keep the output of a run that was made by hand
    python scripts/bench_all.py --table                 # write table and pictures from the results that are kept

A benchmark leaves one JSON file in docs/benchmarks: figures, command, date, load, machine and versions. One whose
result is there, of the same command, machine and versions, is not run again unless `--again`; so a sitting that was
cut goes on. One that fails is reported and its error kept as its result, and the others are run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numbers_asked import BEGIN, BENCHES, END, Bench, block

from align.tracking import replace_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "docs" / "benchmarks"
PICTURES = {
    "algorithms.svg": ("algorithms", "bench_algorithms", "arms"),
    "sparsity_arms.svg": ("sparsity_science", "bench_sparsity_science", "rows"),
}
"""Of each picture in docs/pictures: the result it shows, the module whose `plot` draws it, and the key it takes."""
PATIENCE = 6.0  # a benchmark that takes so many times its minutes, and five more, hangs


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results that are kept, by benchmark."""
    paths = {name: folder / f"{name}.json" for name in BENCHES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def figures_in(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is, or that it ends with on lines of its own.

    Raises:
        ValueError: there is none.
    """
    begins = [0, *(found.start() for found in re.finditer(r"^\{", text, re.M))]
    for start in dict.fromkeys(begins):
        try:
            found, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and not re.search(r"^[{\[]", text[end:], re.M):
            return found
    raise ValueError("no JSON object was printed")


def pytest_figures(file: Path) -> dict[str, Any]:
    """Return how many tests a junit file has, how many failed and were skipped, and what they recorded of themselves.

    Raises:
        ValueError: nothing was collected, or everything skipped: that proves nothing.
    """
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    if len(cases) == skipped:
        raise ValueError(f"{skipped} tests were skipped, and no other was there")
    told = [
        {"test": case.get("name"), **{p.get("name"): p.get("value") for p in case.iter("property")}}
        for case in cases if case.find("properties") is not None
    ]  # fmt: skip
    return {
        "tests": len(cases) - skipped, "failed": len(failed), "skipped": skipped,
        "failures": [case.get("name") for case in failed], "told": told,
    }  # fmt: skip


def processor() -> str:
    """Return the name of the processor, where the system says it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def is_current(old: Mapping[str, Any], bench: Bench, here: Mapping[str, Any]) -> bool:
    """Say whether a result is of this command, this machine and these versions, and none of a failure."""
    machine, versions = old.get("machine", {}), old.get("versions", {})
    return (
        "error" not in old
        and old["command"] == bench.command.format(json="FILE", work="DIR")
        and all(machine.get(key) == here["machine"][key] for key in ("platform", "device", "cpus"))
        and all(versions.get(key) == value for key, value in here["versions"].items())
    )


def describe() -> dict[str, Any]:
    """Return versions and machine, as every run of the library records them, without the release of the kernel."""
    from align.run import describe_machine

    return tidied(describe_machine(), processor())


def tidied(about: dict[str, dict[str, str]], name: str = "") -> dict[str, Any]:
    """Return a record of `describe_machine` as results keep it."""
    machine = dict(about["machine"])
    machine["platform"] = re.sub(r"^(\w+)-.*?-(x86_64|aarch64|arm64)\b.*", r"\1 \2", machine["platform"])
    return {"versions": about["versions"], "machine": machine | ({"processor": name} if name else {})}


def lifted(figures: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return figures without versions, machine and command lines, and versions and machine where they are told."""
    about = figures if "versions" in figures else figures.get("machine", {})
    told = {"versions": about["versions"], "machine": about["machine"]} if "versions" in about else {}
    return {k: v for k, v in figures.items() if k not in ("versions", "machine", "command", "cells")}, told


def run(bench: Bench, work: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run a benchmark in a process of its own, and return its result: figures, or the error it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        out, junit = Path(folder) / "figures.json", Path(folder) / "junit.xml"
        tests = bench.command.startswith("-m pytest")
        words = [word.format(json=out, work=work) for word in shlex.split(bench.command)]
        if quick:
            words += shlex.split(bench.quick)
        if tests:
            words += ["-o", "junit_family=xunit1", f"--junitxml={junit}"]
        work.mkdir(parents=True, exist_ok=True)
        before, began = os.getloadavg()[0], time.monotonic()
        code, printed, said = _call([sys.executable, *words], 60 * (PATIENCE * bench.minutes + 5))
        result: dict[str, Any] = {
            "command": f"{bench.command} {bench.quick if quick else ''}".strip().format(json="FILE", work="DIR"),
            "date": datetime.date.today().isoformat(), "seconds": round(time.monotonic() - began, 1),
            "load": [round(before, 2), round(os.getloadavg()[0], 2)], "exit": code,
        }  # fmt: skip
        try:
            if tests:
                if not (quick and code == 0):  # nothing but collected
                    result["figures"] = pytest_figures(junit)
            else:
                found = figures_in(out.read_text(encoding="utf-8") if out.is_file() else printed)
                result["figures"], told = lifted(found)
                result |= {"versions": told["versions"]} if told else {}
        except (ValueError, OSError, ElementTree.ParseError) as error:
            result["error"] = _last_line(said) or _last_line(printed) or str(error)
        if code and "error" not in result and not _is_verdict(result["figures"]):
            result["error"] = _last_line(said) or f"exit code {code}"
    return result


def _is_verdict(figures: Mapping[str, Any]) -> bool:
    """Say whether a command that ended with an exit code of 1 is known to have said by it what its figures say."""
    parts = (figures, *(part for part in figures.values() if isinstance(part, Mapping)))
    return any(part.get(key) for part in parts for key in ("failed", "failures", "differing")) or "ok" in figures


def _call(command: Sequence[str], seconds: float) -> tuple[int, str, str]:
    """Run a command from the project's folder on one thread; kill it and all it started when it takes too long."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **quiet}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, said = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            printed, said = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said += f"\nstopped after {seconds / 60:.0f} minutes"
    return process.returncode, printed, said


def _last_line(text: str) -> str:
    """Return what went wrong: the last error named, of a child where the command says only that it failed, or line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?!.*CalledProcess)[\w.]+(Error|Exit|Exception)\b", line)]
    last = [*lines[-1:], *named[-1:]][-1] if lines else ""
    return last.replace(str(ROOT) + os.sep, "").replace(tempfile.gettempdir(), "TMP").replace("|", "/")[:200]


def missing(bench: Bench) -> str:
    """Return what this machine lacks for a benchmark; nothing where it can run."""
    if bench.needs == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "a GPU"
    return "ALIGN_DATA" if bench.needs == "data" and not os.environ.get("ALIGN_DATA") else ""


def remaining(left: Iterable[str], declared: float, took: float, minutes: Mapping[str, float]) -> float:
    """Return the minutes that are left: those declared, at the pace of the benchmarks that were run."""
    return sum(minutes[name] for name in left) * (took / declared if declared else 1.0)


def run_all(
    benches: Mapping[str, Bench], results: Path, work: Path, *, again: bool = False, quick: bool = False
) -> dict[str, str]:
    """Run benchmarks one after another, and return by name what went wrong, of those that went wrong."""
    here, kept, wrong = describe(), read_results(results), {}
    minutes = {name: bench.minutes for name, bench in benches.items()}
    declared = took = 0.0
    for place, (name, bench) in enumerate(benches.items(), 1):
        head, old = f"[{place}/{len(benches)}] {name}", kept.get(name)
        if lacks := missing(bench):
            say(f"{head}: not run, needs {lacks}")
            continue
        if old and not again and not quick and is_current(old, bench, here):
            say(f"{head}: has a result of {old['date']}; --again measures it anew")
            continue
        left = remaining(list(benches)[place - 1 :], declared, took, minutes)
        say(f"{head}: " + ("small" if quick else f"about {bench.minutes:g} min; {left:.0f} min left of all"))
        result = run(bench, work / name, quick=quick)
        told = result.get("versions", {})
        result |= {**here, "versions": {**told, **here["versions"]}}
        declared, took = declared + bench.minutes, took + result["seconds"] / 60
        if not quick:
            results.mkdir(parents=True, exist_ok=True)
            replace_text(results / f"{name}.json", json.dumps(result, indent=1) + "\n")
            if results == RESULTS:
                write_table(PAGE, results)
        if "error" in result:
            wrong[name] = result["error"]
        say(f"{head}: {result['seconds']:.0f} s, " + (f"failed: {wrong[name]}" if name in wrong else "done"))
    return wrong


def say(text: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def take(name: str, file: Path, results: Path) -> None:
    """Keep what a benchmark's command wrote or printed in an earlier run, under the date of that file.

    Raises:
        ValueError: there is no JSON object in it.
    """
    figures, told = lifted(figures_in(file.read_text(encoding="utf-8")))
    about = tidied(told) if told else {}
    date = datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()
    command = BENCHES[name].command.format(json="FILE", work="DIR")
    result = {"command": command, "date": date, "taken": True, "figures": figures, **about}
    results.mkdir(parents=True, exist_ok=True)
    replace_text(results / f"{name}.json", json.dumps(result, indent=1) + "\n")


def with_table(page: str, table: str) -> str:
    """Return a page with the generated part replaced.

    Raises:
        ValueError: the page has no such part.
    """
    before, began, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not began or not ended:
        raise ValueError(f"the page lacks the lines {BEGIN!r} and {END!r}")
    return before + table + after


def written(page: Path, results: Path) -> dict[Path, str]:
    """Return what the results that are kept make of the page and of the pictures beside it, by file."""
    kept = read_results(results)
    files = {page: with_table(page.read_text(encoding="utf-8"), block(kept))}
    for picture, (name, module, key) in PICTURES.items():
        if "figures" in kept.get(name, {}):
            drawn = importlib.import_module(module).plot(kept[name]["figures"][key])
            files[page.parent / "pictures" / picture] = drawn
    return files


def stale(files: Mapping[Path, str]) -> list[str]:
    """Return the names of those files that say something else."""
    return [path.name for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def write_table(page: Path, results: Path) -> None:
    """Write the table and the pictures from the results that are kept."""
    for path, text in written(page, results).items():
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)


def listing(results: Path) -> str:
    """Return a line a benchmark: minutes, needs, date of its result, command."""
    kept = read_results(results)
    lines = []
    for name, bench in BENCHES.items():
        old = kept.get(name, {})
        state = f"failed {old['date']}" if "error" in old else old.get("date", "no result")
        command = bench.command.format(json="FILE", work="DIR")
        lines.append(f"{name:18} {bench.minutes:4g} min  {bench.needs:4}  {state:17}  python {command}")
    total = sum(bench.minutes for bench in BENCHES.values() if bench.needs == "cpu") / 60
    return "\n".join([*lines, f"{len(BENCHES)} benchmarks, {total:.1f} hours on two cores"]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 when a benchmark failed or the table was stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, metavar="NAME", help="run these alone")
    parser.add_argument("--skip", nargs="+", choices=BENCHES, metavar="NAME", default=(), help="leave these out")
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is kept")
    parser.add_argument("--again", action="store_true", help="also measure what has a result")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--table", action="store_true", help="write table and pictures, and run nothing")
    parser.add_argument("--check", action="store_true", help="with --table: write nothing, and exit with 1 if stale")
    parser.add_argument("--take", nargs=2, metavar=("NAME", "FILE"), help="keep the output of an earlier run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of unfinished work")
    options = parser.parse_args(argv)
    if options.list:
        sys.stdout.write(listing(options.results))
        return 0
    if options.check:
        old = stale(written(PAGE, options.results))
        sys.stdout.write("".join(f"{name} is stale: run python scripts/bench_all.py --table\n" for name in old))
        return int(bool(old))
    wrong: dict[str, str] = {}
    if options.take:
        if options.take[0] not in BENCHES:
            parser.error(f"--take: {options.take[0]} is none of {', '.join(BENCHES)}")
        take(options.take[0], Path(options.take[1]), options.results)
    elif not options.table:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end what runs, with all it started
        names = [name for name in options.only or BENCHES if name not in options.skip]
        work = options.work.with_name(options.work.name + "_quick") if options.quick else options.work
        wrong = run_all(
            {name: BENCHES[name] for name in names}, options.results, work.resolve(), again=options.again,
            quick=options.quick,
        )  # fmt: skip
        sys.stdout.write("".join(f"{name} failed: {error}\n" for name, error in wrong.items()))
    if not options.quick and options.results == RESULTS:
        write_table(PAGE, options.results)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
