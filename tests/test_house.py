"""The house rules, read from the sources: layers, cycles, forbidden calls, documentation, dead options, start-up time.

Every rule is a function of source text, and each is shown a source that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("align", "rewards", "trainers", "configs")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in (*PACKAGES, "scripts")
    for path in sorted((ROOT / package).rglob("*.py"))
}
LIBRARY = {name: text for name, text in SOURCES.items() if not name.startswith("scripts/")}


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name) for name in LIBRARY}


def room(module: str) -> tuple[int, str]:
    """Return (row, room) of a module, as docs/architecture.md draws them."""
    parts = module.split(".")
    if parts[0] == "scripts" or module == "align.cli" or module.startswith("align.commands"):
        return 4, module
    if parts[0] == "trainers" or module.startswith("align.reports"):
        return 3, "trainers" if parts[0] == "trainers" else "align.reports"
    if parts[0] == "rewards":
        return 2, "rewards"
    if parts[0] == "align" and len(parts) > 1 and parts[1] in ("diffusion", "feedback", "sparsity"):
        return 1, f"align.{parts[1]}"
    return 0, "align"


def nodes(text: str, *, lazy: bool = True, typing: bool = False) -> Iterator[ast.AST]:
    """Walk a source; without `lazy` leave out function bodies, without `typing` TYPE_CHECKING blocks."""
    stack: list[ast.AST] = [ast.parse(text)]
    while stack:
        node = stack.pop()
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        stack.extend(ast.iter_child_nodes(node))


def imports(text: str, **how: bool) -> set[str]:
    """Return the dotted names a source imports, submodules where they are modules of ours."""
    found = set()
    for node in nodes(text, **how):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


def climbs(name: str, text: str) -> list[str]:
    """Imports from a higher row, or from another room of the same row above row 0."""
    row, own = room(module_of(name))
    wrong = []
    for target in imports(text, typing=True):
        if target.split(".")[0] not in PACKAGES:
            continue
        other_row, other = room(target)
        if other_row > row or (other_row == row and 0 < row < 4 and other != own):
            wrong.append(f"{name} imports {target}")
    return wrong


def cycles(sources: dict[str, str]) -> list[list[str]]:
    """Cycles of module-level imports."""
    graph = {
        module_of(n): {t for t in imports(text, lazy=False) if t in MODULES} - {module_of(n)}
        for n, text in sources.items()
    }
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in graph.get(module, ()):
            if state.get(target) == 1:
                found.append([*path[path.index(target) :], target] if target in path else [module, target])
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in graph:
        if module not in state:
            visit(module, [module])
    return found


def forbidden(name: str, text: str) -> list[str]:
    """Calls and statements the house does not use."""
    wrong = []
    for node in nodes(text, typing=True):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name != "align/unpickling.py":
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            wrong += [
                f"{where} imports {n}"
                for n in names
                if n.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve", "joblib")
            ]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call in ("torch.load", "np.load", "numpy.load", "pandas.read_pickle") and name != "align/unpickling.py":
                wrong.append(f"{where} calls {call}")
            if call in ("print", "eval", "exec"):
                wrong.append(f"{where} calls {call}")
        elif isinstance(node, ast.Assert):
            wrong.append(f"{where} asserts")
        elif isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        ):
            wrong.append(f"{where} catches everything")
    return wrong


def undocumented(name: str, text: str) -> list[str]:
    """Public functions, methods and classes without a docstring or without full type hints."""
    tree = ast.parse(text)
    wrong = [] if ast.get_docstring(tree) or not text.strip() else [f"{name} has no docstring"]

    def check(body: list[ast.stmt], owner: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    wrong.append(f"{name}: class {node.name} has no docstring")
                check(node.body, node.name + ".")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                label = f"{name}: {owner}{node.name}"
                dunder = node.name.startswith("__") and node.name.endswith("__")
                if not node.name.startswith("_") and not ast.get_docstring(node):
                    wrong.append(f"{label} has no docstring")
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if (not node.name.startswith("_") or dunder) and (untyped or node.returns is None):
                    wrong.append(f"{label} is not fully typed")

    check(tree.body, "")
    return wrong


def config_fields(text: str) -> set[str]:
    """The fields of the configuration classes."""
    return {
        item.target.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_")
    }


def attributes_read(text: str) -> set[str]:
    """Attribute names a source reads, and the parameters of functions a section is unpacked into."""
    return {n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def heavy(name: str, text: str) -> list[str]:
    """Imports of heavy packages at module level in row 0."""
    return [
        f"{name} imports {t}"
        for t in imports(text, lazy=False)
        if t.split(".")[0] in ("torch", "diffusers", "transformers", "pandas")
    ]


def test_imports_never_climb():
    assert [w for name, text in SOURCES.items() for w in climbs(name, text)] == []


def test_no_import_cycles():
    assert cycles(LIBRARY) == []


def test_nothing_forbidden():
    assert [w for name, text in LIBRARY.items() for w in forbidden(name, text)] == []


def test_public_functions_are_documented_and_typed():
    assert [w for name, text in SOURCES.items() for w in undocumented(name, text)] == []


def test_every_config_field_is_read():
    configs = [name for name in LIBRARY if re.fullmatch(r"align/(\w+_)?config\.py", name)]
    others = {*configs, "align/cli.py", *(name for name in LIBRARY if re.fullmatch(r"align/(\w+_)?checks\.py", name))}
    readers = {n: t for n, t in LIBRARY.items() if n not in others}
    read = set().union(*(attributes_read(text) for text in readers.values()))
    # The advantage section is unpacked whole into the parameters of one function.
    unpacked = {
        a.arg
        for node in ast.walk(ast.parse(LIBRARY["trainers/advantages.py"]))
        if isinstance(node, ast.FunctionDef) and node.name == "group_advantages"
        for a in node.args.kwonlyargs
    }
    shown_to_people = {"about"}
    fields = set().union(*(config_fields(LIBRARY[name]) for name in configs))
    assert fields - read - unpacked - shown_to_people == set()


def test_row_0_imports_nothing_heavy():
    assert [w for name, text in LIBRARY.items() if room(module_of(name))[0] in (0, 4) for w in heavy(name, text)] == []


def test_no_file_names_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    pattern = re.compile(r"/(?:home|root|Users)/\w")
    wrong = []
    for name in filter(None, tracked):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".cfg", ".toml", ".sh", ".json", ".txt", "") and path.is_file():
            wrong += [
                f"{name}: {m.group()}" for m in pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))
            ]
    assert wrong == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (climbs, "align/types.py", "import rewards.base"),
        (climbs, "align/diffusion/x.py", "def f() -> None:\n    from trainers import DanceGRPO"),
        (climbs, "align/reports/x.py", "from trainers.receipt import Receipt"),
        (climbs, "align/diffusion/x.py", "from align.feedback import store"),
        (forbidden, "align/x.py", "import pickle"),
        (forbidden, "align/x.py", "torch.load('x')"),
        (forbidden, "align/x.py", "print(1)"),
        (forbidden, "align/x.py", "assert x"),
        (forbidden, "align/x.py", "try:\n    f()\nexcept:\n    g()"),
        (forbidden, "align/x.py", "try:\n    f()\nexcept Exception:\n    g()"),
        (undocumented, "align/x.py", '"""D."""\ndef f() -> None:\n    return None'),
        (undocumented, "align/x.py", '"""D."""\ndef f(x) -> None:\n    """D."""'),
        (undocumented, "align/x.py", '"""D."""\nclass A:\n    """D."""\n    def f(self):\n        """D."""'),
        (undocumented, "align/x.py", "x = 1"),
        (heavy, "align/x.py", "import torch.nn"),
    ],
)
def test_each_rule_can_fail(rule, name, text):
    assert rule(name, text)


def test_rules_spare_what_is_right():
    assert climbs("trainers/x.py", "from rewards.base import Reward\nfrom align.run import Run") == []
    assert heavy("align/x.py", "def f() -> None:\n    import torch") == []
    a, b = "import align.registry\nimport align.errors", "import align.types"
    assert cycles({"align/types.py": a, "align/registry.py": b}) and not cycles({"align/types.py": a})
    assert config_fields("class AConfig:\n    dead: int = 1") - attributes_read("x.alive") == {"dead"}


@pytest.mark.parametrize("code", [("-c", "import align"), ("-m", "align.cli", "--help")])
def test_start_up_is_light(code):
    """What start-up costs is what it imports, counted over bare Python: a clock would measure the machine."""

    def imported(*arguments: str) -> list[str]:
        command = [sys.executable, "-X", "importtime", *arguments]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stderr
        return [line for line in shown.splitlines() if line.startswith("import time:")]

    listing = "\n".join(imported(*code))
    assert len(imported(*code)) - len(imported("-c", "pass")) < 120
    assert not re.search(r"\|\s+(torch|pydantic|numpy|diffusers)$", listing, re.M)
