"""One small family of exceptions: what happened, where, why, and what to do about it."""

from __future__ import annotations


class AlignError(Exception):
    """Base of every error that `align` raises on purpose.

    Each part is one short sentence without a final full stop. `str(error)` joins the parts that are
    given, so that a message always reads: what (where): why. Do this.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        message = what
        if where:
            message += f" ({where})"
        if why:
            message += f": {why}"
        if do:
            message = f"{message.removesuffix('.')}. {do}"
        super().__init__(message if message.endswith(("?", ".")) else message + ".")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.why, self.do))


def _rebuild(kind: type[AlignError], what: str, where: str, why: str, do: str) -> AlignError:
    return kind(what, where=where, why=why, do=do)


def first_line(error: BaseException) -> str:
    """Return the first line of what a library said, or the error's name where it said nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(AlignError):
    """A configuration that cannot mean what its author intended."""


class DataError(AlignError):
    """A prompt file, table or image that cannot be read as what it claims to be."""


class ModelError(AlignError):
    """A model folder, component or adapter that cannot be loaded or trained as asked."""


class KernelError(AlignError):
    """A transition that has no density, or a schedule it cannot run on."""


class RewardError(AlignError):
    """A reward that is unknown, cannot be built, or failed for more samples than allowed."""


class GuardError(AlignError):
    """A training invariant was broken: a non-finite value, a first ratio that is not 1."""


class CheckpointError(AlignError):
    """A checkpoint that is torn, foreign, or does not belong to this run."""
