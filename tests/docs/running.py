"""Blocks, run as a reader of the page would in one folder: commands through the library's own command line.

The quick way is dry: what takes long, and what needs something, becomes a dry run, and Python is resolved name by name.
The other way blocks run as they are written, and those that need something are left out, but for time if there is some.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import configparser
import contextlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.cli import main
from align.commands.dry import config_findings
from align.config import load_config
from align.errors import AlignError
from tests.docs.blocks import ROOT, Block, Wrong

LONG = {
    "demo", "train", "resume", "sample", "evaluate", "export", "fit", "peering", "score", "select", "plan", "pareto",
    "report", "feedback serve", "feedback annotate", "feedback report", "rewards serve",
}  # fmt: skip
"""Verbs that become dry runs in the quick tests."""
GROUPS = {"configs", "feedback", "rewards", "sparsity"}
"""Verbs that are the first of two words."""
MAKES = {"train", "fit", "peering", "select", "sample", "configs copy", "feedback convert", "feedback export"}
"""Verbs that go on with, or refuse, what is there already: what the prepared folder has of it makes room first."""
MISTAKES = (
    AlignError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, ImportError, OSError,
    RuntimeError, ArithmeticError,
)  # fmt: skip
"""What a block of Python raises where the page is wrong."""
PLAIN = {"cat", "echo", "printf", "mkdir"}
LAUNCHERS = {"deepspeed", "torchrun", "accelerate"}
SHELL = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


class Session:
    """The reader of one page: what its commands made, and the names that its Python has so far."""

    def __init__(self, *, dry: bool = False, patient: bool = False) -> None:
        self.dry = dry
        self.has = {"time"} if patient else set()
        self.names: dict[str, Any] = {"__name__": "page"}
        self.made: set[Path] = set()

    def run(self, block: Block) -> None:
        """Run one block in the current folder; raise `Wrong` where it does not do what the page says."""
        try:
            if self.dry or not set(block.needs) - self.has:
                getattr(self, f"_{block.language}")(block)
        except MISTAKES as error:
            raise Wrong(f"{block.where}: {type(error).__name__}: {error}") from error
        if block.file:
            path = Path(block.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")

    # --- commands

    def _bash(self, block: Block) -> None:
        if block.text.startswith("#!"):
            _shell(block, f"bash -n <<'BLOCK'\n{block.text}BLOCK\n")
            for _, rest in re.findall(r"(-m align\.cli) ([^\"&]*)", block.text.replace("\\\n", " ")):
                with as_launched():
                    self._align(block, shlex.split(rest))
            return
        for statement in statements(block.text):
            if "<<" in statement:
                _shell(block, statement)
                continue
            for words in _commands(statement):
                self._command(block, words, statement)

    def _command(self, block: Block, words: list[str], statement: str) -> None:
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        name = words[0]
        if name == "align":
            self._align(block, words[1:])
        elif name == "cd":
            os.chdir(words[1])
        elif name in PLAIN:
            _shell(block, " ".join(word if word == ">" else shlex.quote(word) for word in words))
        elif name in LAUNCHERS:
            with as_launched():
                self._align(block, launched(block, words))
        elif name == "pip":
            _require_extra(block, words)
        elif name == "make":
            _shell(block, shlex.join(["make", "-n", "-C", str(ROOT), *words[1:]]))
        elif name == "python":
            self._python_command(block, words)
        else:
            raise Wrong(f"{block.where}: nobody runs {name!r} here: {statement}")

    def _align(self, block: Block, words: list[str]) -> None:
        verb = words[0] if words and words[0] not in GROUPS else " ".join(words[:2])
        if self.dry and (_takes_dry_run(words) if block.needs else verb in LONG):
            words = [*words, "--dry-run"]
        elif verb in MAKES:
            self._make_room(words)
        if self.dry and words[-1] == "--dry-run" and verb in ("train", "fit", "peering"):
            words = [*words, "--overwrite"]  # a run that is prepared stands in for the reader's own
        if verb == "feedback serve" and "--dry-run" not in words:
            _serve(block, words)
            return
        code, out, err = call(words)
        if code != 0:
            raise Wrong(f"{block.where}: exit code {code}: align {shlex.join(words)}\n{out}{err}")

    def _make_room(self, words: list[str]) -> None:
        if words[0] in GROUPS:
            out = Path(words[3])
        elif "--out" in words:
            out = Path(words[words.index("--out") + 1])
        elif Path(words[1]).suffix in (".yaml", "") and words[0] in ("train", "fit", "peering"):
            out = Path("runs") / load_config(words[1]).name
        else:
            return
        self._clear(out)

    def _clear(self, out: Path) -> None:
        if out.absolute() not in self.made:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        self.made.add(out.absolute())

    def _python_command(self, block: Block, words: list[str]) -> None:
        if words[1] == "-c":
            self._python(Block(block.page, block.line, "python", words[2] + "\n", block.needs))
        elif words[1:3] == ["-m", "pytest"]:
            self._tests(block, words[3:])
        elif words[1].startswith("scripts/"):
            require_script(block, words[1:])
        elif words[1] == "-m" and words[2].startswith("scripts."):
            require_script(block, [words[2].replace(".", "/") + ".py", *words[3:]])
        elif subprocess.run([sys.executable, *words[1:]], timeout=60).returncode != 0:
            raise Wrong(f"{block.where}: {shlex.join(words)} failed")

    def _tests(self, block: Block, words: list[str]) -> None:
        for word in words:
            if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
                raise Wrong(f"{block.where}: there is no {word}")
        if not self.has:
            return
        kept = [word for word in words if not word.startswith("--junitxml")]  # it would write the file
        command = [sys.executable, "-m", "pytest", "--collect-only", *kept]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise Wrong(f"{block.where}: no tests: {shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    # --- Python

    def _python(self, block: Block) -> None:
        tree = ast.parse(block.text)
        resolve(tree, self.names)
        if not self.dry:
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg == "out" and isinstance(node.value, ast.Constant):
                    self._clear(Path(node.value.value))
            code = compile(block.text, str(Path(block.file or block.where).absolute()), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)

    # --- files

    def _yaml(self, block: Block) -> None:
        from align.textfiles import parse_yaml

        value: Any = parse_yaml(block.text, block.where).value
        if "kind" in value:
            return  # a task of feedback, which `align feedback serve` reads as a file
        if block.over:
            value = {"extends": block.over, **value}
        elif set(value) <= {"rewards", "heldout_rewards", "combine"}:
            value = {"extends": "digits/dance_grpo", **value}
        config = load_config(value)
        found = [finding for finding in config_findings(config) if finding.level == "error"]
        errors = [f.message for f in found if not (f.key == "model.path" and config.model.path.startswith("/models/"))]
        if errors:
            raise Wrong(f"{block.where}: {'; '.join(errors)}")

    def _json(self, block: Block) -> None:
        for line in block.text.splitlines():
            json.loads(line)

    def _ini(self, block: Block) -> None:
        parser = configparser.ConfigParser()
        parser.read_string(block.text)
        _require_groups(block, parser["options.entry_points"])

    def _toml(self, block: Block) -> None:
        _require_groups(block, tomllib.loads(block.text)["project"]["entry-points"])

    def _html(self, block: Block) -> None:
        server = ROOT / "align" / "feedback" / "server" / "static"
        for path in re.findall(r"/static/([\w.-]+)", block.text):
            script = (server / path).read_text(encoding="utf-8")
            for name in re.findall(r"(?<!new )\b(?:feedback\.(\w+)|(AlignFeedback))\(", block.text):
                if not re.search(rf"\b{name[0] or name[1]}\b", script):
                    raise Wrong(f"{block.where}: {path} has no {name[0] or name[1]}")

    def _text(self, block: Block) -> None:
        pass


def _require_groups(block: Block, groups: Any) -> None:
    for group in groups:
        if group not in ("align.rewards", "align.families"):
            raise Wrong(f"{block.where}: nobody reads the entry-point group {group!r}")


# --- the shell


def statements(text: str) -> list[str]:
    """Split a block into statements: a line with its continuations and here-documents, or the lines of a quote."""
    found, held, end = [], "", ""
    for line in text.splitlines():
        held += line + "\n"
        if end:
            end = "" if line == end else end
        elif mark := re.search(r"<<'?(\w+)'?", line):
            end = mark[1]
        if end or line.endswith("\\"):
            continue
        if held.strip() and not held.lstrip().startswith("#"):
            found.append(held if "<<" in held else held.replace("\\\n", " ").strip())
        held = ""
    return found + ([held] if held.strip() else [])


def _commands(statement: str) -> list[list[str]]:
    """Split `a && b` into the words of each; a comment ends a line."""
    lexer = shlex.shlex(statement, posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def _shell(block: Block, text: str) -> None:
    done = subprocess.run(["bash", "-ec", text], env=SHELL, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise Wrong(f"{block.where}: {text}: {done.stderr}")


def call(words: list[str]) -> tuple[int, str, str]:
    """Run `align` in this process; return its exit code, and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def _takes_dry_run(words: list[str]) -> bool:
    from align.cli import _parser

    parser: argparse.ArgumentParser = _parser()
    for word in words:
        action = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if action is None or word not in action.choices:
            break
        parser = action.choices[word]
    return "--dry-run" in parser._option_string_actions


def _serve(block: Block, words: list[str]) -> None:
    """Serve at a free port, look at the page as a browser would, and press ctrl-c."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: list[int] = []
    ended = threading.Event()

    def look() -> None:
        until = time.monotonic() + 20
        while not seen and not ended.wait(0.05) and time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                seen.append(answer.status)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    reader = threading.Thread(target=look)
    reader.start()
    code, out, err = call([*words, "--port", str(port)])
    ended.set()
    reader.join()
    if code != 0 or seen != [200]:
        raise Wrong(f"{block.where}: exit code {code}, the page answered {seen}: {shlex.join(words)}\n{out}{err}")


def launched(block: Block, words: list[str]) -> list[str]:
    """Return the words of `align` in a launcher's command line."""
    for i, word in enumerate(words):
        if word == "scripts/train.py":
            return ["train", *words[i + 1 :]]
        if word == "align.cli":
            return words[i + 1 :]
    raise Wrong(f"{block.where}: {words[0]} starts nothing of ours: {shlex.join(words)}")


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Have what a dry run reads of a launcher's environment, as the first of two processes."""
    before = dict(os.environ)
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def require_launch(block: Block, words: list[str]) -> None:
    """Have the launcher's own parser read its command line, a variable of the shell being 1."""
    words = [re.sub(r"\$[A-Z_]+", "1", word) for word in words]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser as torchrun

        torchrun().parse_args(words[1:])
    elif words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args(words[2:])
    else:
        from deepspeed.launcher.runner import parse_args

        parse_args(words[1:])


def _require_extra(block: Block, words: list[str]) -> None:
    """Look the extra of `pip install 'align[extra]'` up in the packaging metadata."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    found = re.fullmatch(r"align\[(\w+)\]", words[-1])
    if words[1] != "install" or found is None or found[1] not in metadata["options.extras_require"]:
        raise Wrong(f"{block.where}: {shlex.join(words)} installs nothing of ours")


class _Parsed(Exception):
    """The arguments were read, and that is all that was asked for."""


def require_script(block: Block, words: list[str]) -> None:
    """Run a script as far as its own parser, which must take the arguments."""
    path, given, own = ROOT / words[0], sys.argv, argparse.ArgumentParser
    if not path.is_file():
        raise Wrong(f"{block.where}: there is no {words[0]}")

    def stopping(parse: Any) -> Any:
        def stop(parser: Any, args: Any = None, namespace: Any = None) -> Any:
            parse(parser, args, namespace)
            raise _Parsed

        return stop

    said, places = io.StringIO(), list(sys.path)
    parsers = {name: getattr(own, name) for name in ("parse_args", "parse_intermixed_args")}
    for name, parse in parsers.items():
        setattr(own, name, stopping(parse))
    sys.argv = words
    sys.path.insert(0, str(path.parent))
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(path), run_name="__main__")
        raise Wrong(f"{block.where}: {words[0]} read no arguments")
    except _Parsed:
        pass
    except SystemExit as error:
        raise Wrong(f"{block.where}: {shlex.join(words)}: {said.getvalue()}") from error
    finally:
        sys.argv, sys.path[:] = given, places
        for name, parse in parsers.items():
            setattr(own, name, parse)


# --- Python that is not run


def resolve(tree: ast.Module, names: dict[str, Any]) -> None:
    """Import what a block imports, and hold its calls of known things to their signatures.

    Raises:
        ImportError, AttributeError: a name that does not exist.
        TypeError: arguments that a function does not take.
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "page", "exec"), names)
    own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = _known(node.func, names, own)
            starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            if callable(function) and not starred:
                _bind(function, len(node.args), [keyword.arg or "" for keyword in node.keywords])


def _known(node: ast.expr, names: dict[str, Any], own: set[str]) -> Any:
    """Return what a dotted name stands for; None where only running would tell."""
    if isinstance(node, ast.Name):
        return None if node.id in own else names.get(node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute):
        owner = _known(node.value, names, own)
        return None if owner is None else getattr(owner, node.attr)
    return None


def _bind(function: Any, positional: int, keywords: list[str]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in, and tells nothing
        return
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))
