"""A torchvision built for CUDA beside a CPU build of torch: found by their files, and mended by a hook.

Its import fails ("operator torchvision::nms does not exist") and takes transformers, diffusers, timm and open_clip with
it. Declaring the two operators it looks for is enough for everything but its own `nms` and `roi` operations, so `fix`
writes a hook into this environment that does so at the moment torchvision is imported. With a matching pair the hook is
never written.
"""

from __future__ import annotations

import sysconfig
from importlib.machinery import PathFinder
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


def _site() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def is_mended() -> bool:
    """Return whether the hook is in place."""
    return (_site() / f"{HOOK}.pth").is_file()


def has_cuda() -> bool:
    """Return whether torch was built with CUDA, read from its files alone."""
    spec = PathFinder.find_spec("torch")
    home = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    return home is not None and any((Path(home) / "lib").glob("*torch_cuda*"))


def is_mismatched() -> bool:
    """Return whether torch has no CUDA and torchvision's compiled part wants it, read from their files alone."""
    spec = PathFinder.find_spec("torchvision")
    home = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if home is None or PathFinder.find_spec("torch") is None or has_cuda():
        return False
    compiled = next(Path(home).glob("_C.*"), None)
    return compiled is not None and b"libtorch_cuda" in compiled.read_bytes()


def fix() -> list[str]:
    """Mend what can be mended and return what was done."""
    hook = _site() / f"{HOOK}.pth"
    if not is_mismatched() or is_mended():
        return []
    (_site() / f"{HOOK}.py").write_text(_HOOK_SOURCE, encoding="utf-8")
    hook.write_text(f"import {HOOK}\n", encoding="utf-8")
    return [f"wrote {hook}"]
