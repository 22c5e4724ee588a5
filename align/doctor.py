"""What is wrong with this installation and machine, why it matters, and what to do about it.

Every check looks at the thing itself (writes a file, binds a port, imports in a child) and changes nothing.
`align.torchvision_hook.fix` mends the one fault that can be mended from here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires, version
from pathlib import Path

from align.errors import ConfigError
from align.registry import suggest
from align.torchvision_hook import HOOK, has_cuda, is_mended, is_mismatched

LEAST_DISK, LEAST_SHARED, LEAST_FILES, DAY = 2e9, 256e6, 1024, 86400
"""A run folder's free bytes, bytes of /dev/shm, files open at once; seconds."""

_TOGETHER = (
    "align", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "datasets",
    "tokenizers", "huggingface-hub", "safetensors", "numpy", "trl",
)  # fmt: skip
"""Packages whose versions have to agree."""
_EXTRAS, _TRUE = ("diffusion", "llm", "rewards", "server", "fast"), ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Check:
    """One finding: its name, whether all is well, what was found, and what to do.

    What is well and still has something to do is advice: it slows a run or keeps one feature from working.

    Args:
        why: what goes wrong if nothing is done.
    """

    name: str
    ok: bool
    found: str
    do: str = ""
    why: str = ""

    @property
    def level(self) -> str:
        """Return "ok", "advice" or "fault"."""
        return "fault" if not self.ok else "advice" if self.do else "ok"


def run_checks(only: Collection[str] = ()) -> list[Check]:
    """Look at this installation and machine, and return what was found; nothing is changed.

    Args:
        only: names of `CHECKS`; all when empty. The last one imports the libraries, which takes seconds.

    Raises:
        ConfigError: an unknown name.
    """
    for name in only:
        if name not in CHECKS:
            raise ConfigError(f"Unknown check {name!r}", do=suggest(name, CHECKS))
    return [check for name, look in CHECKS.items() if not only or name in only for check in look()]


def _check(name: str, ok: bool, found: str, do: str, why: str) -> Check:
    """Return a finding that has nothing to do and no reason where all is well."""
    return Check(name, True, found) if ok else Check(name, False, found, do, why)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _python() -> Iterator[Check]:
    ok = sys.version_info >= (3, 11)
    yield _check("python", ok, platform.python_version(), "Install Python 3.11 or newer", "align does not run on it")


def _packages() -> Iterator[Check]:
    """Whether what the extras need is there."""
    for package, extra in (
        ("torch", "diffusion"), ("diffusers", "diffusion"), ("transformers", "diffusion"), ("peft", "diffusion"),
        ("scikit-learn", "diffusion"), ("accelerate", "llm"),
    ):  # fmt: skip
        found = _installed(package)
        yield _check(
            package, bool(found), found or "not installed", f"Run `pip install 'align[{extra}]'`", "trainers need it"
        )
    for package, does in (("deepspeed", "--launch deepspeed"), ("imageio-ffmpeg", "writing videos")):
        found = _installed(package)
        do = "" if found else f"Run `pip install {package}` if you want that"
        yield Check(package, True, found or f"not installed; {does} needs it", do)


def _versions() -> Iterator[Check]:
    """Whether the versions that are installed are those that the others ask for, as their own metadata say."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ModuleNotFoundError:
        yield Check("versions", True, "not compared", "Run `pip install packaging` to have them compared")
        return
    wrong, seen = [], 0
    for package in _TOGETHER:
        try:
            asked = requires(package) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, asked):
            found = _installed(requirement.name)
            extras = ("", *(_EXTRAS if package == "align" else ()))
            applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
            if not found or not applies or canonicalize_name(requirement.name) not in _TOGETHER:
                continue
            seen += 1
            if not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{package} asks for {requirement.name}{requirement.specifier}, and {found} is installed")
    do = "Run `pip install --upgrade 'align[diffusion,llm]'` in a fresh environment"
    why = "mixed versions fail at import, or worse later"
    met = f"{seen} requirements of one another are met"
    yield _check("versions", not wrong, "; ".join(dict.fromkeys(wrong)) or met, do, why)


def _torchvision() -> Iterator[Check]:
    found, torch = _installed("torchvision"), _installed("torch")
    if not found or not is_mismatched():
        yield Check("torchvision", True, f"{found}, matching torch {torch}" if found else "not installed")
    elif is_mended():
        yield Check("torchvision", True, f"{found} is a CUDA build beside a CPU torch; mended by {HOOK}.pth")
    else:
        yield Check(
            "torchvision", False, f"{found} is a CUDA build beside a CPU torch", "Run `align doctor --fix`",
            "its import fails, and takes transformers and diffusers with it",
        )  # fmt: skip


def _gpus() -> list[str]:
    """Return the accelerators that the driver knows of."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    try:
        said = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in said.stdout.splitlines() if line.startswith("GPU ")] if said.returncode == 0 else []


def _gpu() -> Iterator[Check]:
    """Whether torch sees the accelerators that the driver sees."""
    gpus = _gpus()
    if not gpus:
        yield Check("gpu", True, "none that nvidia-smi lists; torch runs on the CPU")
        return
    cuda, usable = None, False
    if has_cuda():
        said = _child("import json, torch; print(json.dumps([torch.version.cuda, torch.cuda.is_available()]))")
        cuda, usable = json.loads(said.stdout.splitlines()[-1]) if said and said.returncode == 0 else ("", False)
    do = "Install a CUDA build of torch, see the selector on pytorch.org" if cuda is None else (
        f"Look at CUDA_VISIBLE_DEVICES, update the driver to one for CUDA {cuda}, or install torch for the CUDA that "
        "`nvidia-smi` shows"
    )  # fmt: skip
    build = "a CPU build" if cuda is None else f"built for CUDA {cuda}"
    sees = f"{len(gpus)} listed by nvidia-smi; torch is {build} and {'uses' if usable else 'cannot use'} them"
    yield _check("gpu", usable, sees, do, "everything would train on the CPU, far slower")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    missing = [n for n in ("nvcc", "ninja") if not shutil.which(n) and not (Path(home) / "bin" / n).is_file()]
    if _installed("deepspeed") and missing:
        yield Check(
            "compilers", True, f"no {' and no '.join(missing)}", "Install the CUDA toolkit and ninja, or set CUDA_HOME",
            "DeepSpeed builds some of its operations when they are first used",
        )  # fmt: skip


def cache_folder() -> tuple[Path, str]:
    """Return where built models are kept, and the variable that says so: "" where none does."""
    return _place("ALIGN_CACHE") or (Path.home() / ".cache" / "align", "")


def _place(variable: str) -> tuple[Path, str] | None:
    given = os.environ.get(variable)
    return (Path(given).expanduser(), variable) if given else None


def _folders() -> Iterator[Check]:
    """Whether the cache, the hub's cache and the run folder can be written, by writing there, and hold enough."""
    yield _folder("cache", *cache_folder(), "set ALIGN_CACHE to a folder of yours", 0)
    home, variable = _place("HF_HOME") or (Path.home() / ".cache" / "huggingface", "")
    hub, variable = _place("HF_HUB_CACHE") or (home / "hub", variable)
    yield _folder("hub cache", hub, variable, f"set {variable or 'HF_HOME'} to a folder of yours", 0)
    yield _folder("run folder", Path.cwd() / "runs", "", "start in another folder, or give --out", LEAST_DISK)


def _folder(name: str, folder: Path, variable: str, do: str, least: float) -> Check:
    place = next(p for p in (folder, *folder.parents) if p.exists())
    wrong, shown = "", f"{variable}={folder}" if variable else str(folder)
    if not place.is_dir():
        wrong, do = f"{'it' if place == folder else place} is a file, not a folder", f"move that file away, or {do}"
    else:
        try:
            with tempfile.NamedTemporaryFile(dir=place, prefix=".align_doctor_") as file:
                file.write(b"x" * 4096)
                file.flush()
        except OSError as error:
            wrong = error.strerror or str(error)
    if wrong:
        why = "nothing can be kept there"
        return Check(name, False, f"{shown} cannot be written: {wrong}", f"{do[0].upper()}{do[1:]}", why)
    free = shutil.disk_usage(place).free
    if free < least:
        return Check(
            name, False, f"{free / 1e9:.1f} GB free at {folder}", f"Free {least / 1e9:.0f} GB there, or {do}",
            "a checkpoint that does not fit ends the run",
        )  # fmt: skip
    return Check(name, True, f"{folder}, {free / 1e9:.0f} GB free")


def _memory() -> Iterator[Check]:
    """Whether processes can share tensors: containers start with 64 MB of /dev/shm."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    size = shutil.disk_usage(place).total
    yield _check(
        "shared memory", size >= LEAST_SHARED, f"{size / 1e6:,.0f} MB at {place}",
        "Start the container with `--shm-size 8g` or `--ipc host`",
        "several processes end with a bus error when they exchange tensors",
    )  # fmt: skip


def _network() -> Iterator[Check]:
    """Whether processes of one run would find one another."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
        yield Check("host name", True, f"{name} resolves")
    except OSError as error:
        yield Check(
            "host name", False, f"{name} does not resolve: {error.strerror}",
            f"Add `127.0.0.1 {name}` to /etc/hosts", "several processes cannot meet",
        )  # fmt: skip
    known = [interface for _, interface in socket.if_nameindex()]
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = [w.lstrip("=") for w in os.environ.get(key, "").split(",") if w and not w.startswith("^")]
        if lost := [w for w in wanted if not any(interface.startswith(w) for interface in known)]:
            yield Check(
                key, False, f"{lost[0]!r} is none of {', '.join(known)}", f"Unset {key}, or name one of those",
                "several processes cannot meet",
            )  # fmt: skip
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "")
    if port and "RANK" not in os.environ and address in ("localhost", "127.0.0.1", "::1", name):
        problem = _cannot_bind(port)
        yield _check(
            "MASTER_PORT", not problem, f"{port} {problem or 'is free'}",
            f"Unset MASTER_PORT, or end what listens on {port}", "a launch would wait for the wrong process",
        )  # fmt: skip


def _cannot_bind(port: str) -> str:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return "is no port"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except OSError as error:
            return f"cannot be listened on: {error.strerror}"
    return ""


def _hub() -> Iterator[Check]:
    """Whether models of the hub can be fetched, as far as the environment says it."""
    token = os.environ.get("HF_TOKEN", "")
    if token != token.strip() or (token and not token.isprintable()):
        yield Check(
            "hub token", False, "HF_TOKEN has white space around it", "Set it again without the line's end",
            "the hub refuses it, and says that the model does not exist",
        )  # fmt: skip
    off = [k for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(k, "").upper() in _TRUE]
    do = f"Unset {off[0]} to fetch models by name" if off else ""
    yield Check(
        "hub", True, f"{off[0]} is set: only what is on this machine loads" if off else "reached when asked", do
    )


def _threads() -> Iterator[Check]:
    """Whether a process starts no more threads than it may use processors, which containers limit."""
    cpus, given = available_cpus(), os.environ.get("OMP_NUM_THREADS", "")
    if given and not (given.split(",")[0].strip().isdecimal() and int(given.split(",")[0])):
        yield Check("threads", False, f"OMP_NUM_THREADS={given!r} is no number", "Set it to 1 or more", "it is ignored")
        return
    threads = int(given.split(",")[0]) if given else os.cpu_count() or 1
    said = f"OMP_NUM_THREADS={given or 'unset'}, {threads} threads on {cpus} processors; 1 suits the embedded models"
    if threads <= cpus:
        yield Check("threads", True, said)
        return
    yield Check(
        "threads", False, said, f"Set OMP_NUM_THREADS={cpus} (with several processes, {cpus} divided by them)",
        "threads that wait for one another make a step many times slower",
    )  # fmt: skip


def available_cpus() -> int:
    """Return the processors that this process may use: its affinity, and the quota of its control group."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else min(cpus, max(1, -(-int(quota) // int(period))))


def _open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= LEAST_FILES
    do = f"Run `ulimit -n {LEAST_FILES}` first (the most here is {hard})"
    yield _check("open files", ok, f"{soft} at once", do, "workers fail with `Too many open files`")


def _shadows() -> Iterator[Check]:
    """Whether a folder or file of yours stands before a package of the same name."""
    wrong = _hidden()
    do = "Rename it, start elsewhere, or take its folder out of PYTHONPATH"
    found = "; ".join(wrong) or "no package is hidden by one of yours"
    yield _check("shadowed", not wrong, found, do, "another file than you think is imported")


def _hidden() -> list[str]:
    """Return what stands before our packages, a dependency or a module of Python itself."""
    root = Path(__file__).resolve().parents[1]
    ours = ("rewards", "trainers", "configs")
    wrong = [f"{name} is {home}" for name in ours if (home := _home(name)) and home.parent != root]
    places = _dependencies()
    own = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")}
    own |= {folder / "lib-dynload" for folder in own}
    homes = {name: set().union(*(places[package] for package in packages if package in places))
             for name, packages in packages_distributions().items()
             if name.isidentifier() and name not in ours and not places.keys().isdisjoint(packages)}  # fmt: skip
    for name, allowed in {**homes, **dict.fromkeys(sys.stdlib_module_names - {"test"}, own)}.items():
        home = _home(name)
        if home and home.parent not in allowed:
            wrong.append(f"{name} is {home}, not the {'installed one' if name in homes else 'one of Python'}")
    return wrong


def _dependencies() -> dict[str, set[Path]]:
    """Return what align and its extras ask for, and what that asks for in turn, as far as installed, and where it is.

    What is installed in place, by `pip install -e`, may lie anywhere and is left out.
    """
    found: dict[str, set[Path]] = {}
    asked, seen = list(_TOGETHER), set()
    while asked:
        name = re.sub(r"[-_.]+", "-", asked.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if '"editable": true' not in (package.read_text("direct_url.json") or ""):
            found[package.metadata["Name"]] = {Path(str(package.locate_file(""))).resolve()}
        for requirement in package.requires or ():
            extra = re.search(r"""extra == ["'](\w+)""", requirement)
            if extra is None or (name == "align" and extra[1] in _EXTRAS):
                asked.append(re.match(r"[\w.-]+", requirement)[0])
    return found


def _home(name: str) -> Path | None:
    """Return the folder or file that `import name` would take here, as a launcher's processes do, importing nothing."""
    here = [] if sys.flags.safe_path else [os.getcwd()]
    spec = PathFinder.find_spec(name, [*here, *sys.path])
    if spec is None or not spec.origin or not os.path.isabs(spec.origin):
        return None
    origin = Path(spec.origin).resolve()
    return origin.parent if spec.submodule_search_locations else origin


def _clock() -> Iterator[Check]:
    """Whether the clock stands before this very file was written."""
    behind = os.stat(__file__).st_mtime - time.time()
    ok = behind < DAY
    found = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    found += "" if ok else f", {behind / DAY:.0f} days before these files were written"
    yield _check(
        "clock", ok, found, "Set the clock", "certificates are refused, and the newest file is not the last one"
    )


def _imports() -> Iterator[Check]:
    """Whether the libraries import, in a process of their own, which a crash does not take along."""
    names = [n for n in ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "deepspeed")
             if _installed(n)]  # fmt: skip
    said = _child(_IMPORTS.format(names=names))
    lines = [json.loads(line) for line in (said.stdout if said else "").splitlines() if line.startswith('["')]
    wrong = [f"{name}: {problem}" for name, problem in lines if problem]
    if len(lines) < len(names):
        end = "took longer than 5 minutes" if said is None else f"ended the process, exit code {said.returncode}"
        wrong.append(f"{names[len(lines)]}: its import {end}")
    do = "Install it again in the same versions; `import` it by itself to see all of what it says"
    if wrong and (hidden := _hidden()):
        do = f"Mend `shadowed` first, nothing needs to be installed again: {'; '.join(hidden)}"
    found = "; ".join(wrong) or ", ".join(names) or "nothing to import"
    yield _check("imports", not wrong, found, do, "whatever needs it stops at its first line")


_IMPORTS = """
import importlib, json, sys
for name in {names}:
    try:
        module = importlib.import_module(name)
        if name == "deepspeed":
            from deepspeed.accelerator import get_accelerator
            get_accelerator().device_name()
        problem = ""
    except BaseException as error:
        problem = (type(error).__name__ + ": " + str(error)).splitlines()[0][:300]
    sys.__stdout__.write(json.dumps([name, problem]) + "\\n")
    sys.__stdout__.flush()
"""


def _child(code: str) -> subprocess.CompletedProcess[str] | None:
    """Run Python code in a process of its own; None when it does not end."""
    try:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": _python, "packages": _packages, "versions": _versions, "torchvision": _torchvision, "gpu": _gpu,
    "folders": _folders, "memory": _memory, "network": _network, "hub": _hub, "threads": _threads,
    "files": _open_files, "shadowed": _shadows, "clock": _clock, "imports": _imports,
}  # fmt: skip
"""What is looked at, by name; each gives one finding or more."""
