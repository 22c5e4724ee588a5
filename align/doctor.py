"""What is wrong with this installation, and what to do about it.

One fault can be mended from here: a torchvision built for CUDA beside a CPU build of torch. Its import
fails ("operator torchvision::nms does not exist") and takes transformers, diffusers, timm and
open_clip with it. Declaring the two operators it looks for is enough for everything but its own
`nms` and `roi` operations, so `fix` writes a hook into this environment that does so at the moment
torchvision is imported. With a matching pair the hook is never written.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOOK = "align_torchvision_hook"
_HOOK_SOURCE = '''"""Written by `align doctor --fix`: a CUDA torchvision imports beside a CPU torch."""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].kept = self
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


@dataclass(frozen=True)
class Check:
    """One finding: its name, whether all is well, what was found, and what to do if not."""

    name: str
    ok: bool
    found: str
    do: str = ""


def run_checks() -> list[Check]:
    """Look at Python, torch, torchvision, the libraries, the cache, the disk and the threads."""
    return list(_checks())


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _checks() -> Iterator[Check]:
    python = platform.python_version()
    yield Check("python", sys.version_info >= (3, 11), python, "Install Python 3.11 or newer")
    torch = _installed("torch")
    yield Check("torch", bool(torch), torch or "not installed", "pip install 'align[diffusion]'")
    if torch:
        yield _torchvision(torch)
    for package, extra in (
        ("diffusers", "diffusion"),
        ("transformers", "diffusion"),
        ("peft", "diffusion"),
        ("scikit-learn", "diffusion"),
        ("accelerate", "llm"),
    ):
        found = _installed(package)
        yield Check(package, bool(found), found or "not installed", f"pip install 'align[{extra}]'")
    found = _installed("deepspeed")
    yield Check("deepspeed", True, found or "not installed; --launch deepspeed needs it: pip install deepspeed")
    yield _cache()
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Check("disk", free > 2, f"{free:.0f} GB free here", "Free at least 2 GB: runs keep checkpoints")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    yield Check("threads", True, f"OMP_NUM_THREADS={threads or 'unset'}; 1 is fastest for the embedded models")


def _torchvision(torch: str) -> Check:
    found = _installed("torchvision")
    if not found:
        return Check("torchvision", True, "not installed")
    if not _mismatch():
        return Check("torchvision", True, f"{found}, matching torch {torch}")
    if (_site() / f"{HOOK}.pth").is_file():
        return Check("torchvision", True, f"{found} is a CUDA build beside a CPU torch; mended by {HOOK}.pth")
    return Check("torchvision", False, f"{found} is a CUDA build beside a CPU torch", "Run `align doctor --fix`")


def _cache() -> Check:
    folder = Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align").expanduser()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    writable = os.access(place, os.W_OK)
    return Check(
        "cache", writable, f"{folder}{'' if writable else ' cannot be written'}", "Set ALIGN_CACHE to a folder of yours"
    )


def _site() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _mismatch() -> bool:
    """Whether torch has no CUDA and torchvision's compiled part wants it, read from their files alone."""
    from importlib.util import find_spec

    homes = [spec.submodule_search_locations for name in ("torch", "torchvision") if (spec := find_spec(name))]
    if len(homes) != 2 or not all(homes):
        return False
    torch_home, vision_home = (Path(next(iter(home))) for home in homes if home)
    if any((torch_home / "lib").glob("*torch_cuda*")):
        return False
    compiled = next(vision_home.glob("_C.*"), None)
    return compiled is not None and b"libtorch_cuda" in compiled.read_bytes()


def fix() -> list[str]:
    """Mend what can be mended and return what was done."""
    hook = _site() / f"{HOOK}.pth"
    if not _mismatch() or hook.is_file():
        return []
    (_site() / f"{HOOK}.py").write_text(_HOOK_SOURCE, encoding="utf-8")
    hook.write_text(f"import {HOOK}\n", encoding="utf-8")
    return [f"wrote {hook}"]
