"""The number formats of weights: codes as unsigned integers, their values, and the spacing of values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: sign, exponent and mantissa, from the highest bit down."""

    name: str
    bits: int
    mantissa: int

    @property
    def code(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer that holds a code."""
        return np.dtype(f"u{self.bits // 8}")

    @property
    def exponents(self) -> int:
        """How many biased exponents there are; the last is that of Inf and NaN, 0 that of zero and subnormals."""
        return 1 << (self.bits - 1 - self.mantissa)

    @property
    def bias(self) -> int:
        """What is subtracted from a biased exponent."""
        return self.exponents // 2 - 1

    def holds(self, other: Format) -> bool:
        """Return whether every finite value of `other` is one of this format."""
        return self.mantissa >= other.mantissa and self.exponents >= other.exponents

    def spacing(self) -> NDArray[np.float64]:
        """Return ulp by biased exponent: 2^(max(e, 1) - bias - mantissa bits)."""
        e = np.maximum(np.arange(self.exponents), 1)
        return np.ldexp(1.0, e - self.bias - self.mantissa)

    def exponent(self, codes: Codes) -> NDArray[np.int64]:
        """Return the biased exponent of each code."""
        return ((codes >> self.mantissa) & (self.exponents - 1)).astype(np.int64)

    def values(self, codes: Codes) -> NDArray[np.float64]:
        """Return the exact value of each code in double precision."""
        codes = np.ascontiguousarray(codes, self.code)
        if self.name == "BF16":
            exact = (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            exact = codes.view(f"f{self.bits // 8}")
        with np.errstate(invalid="ignore"):  # signalling NaN
            return exact.astype(np.float64)

    def encode(self, values: NDArray[np.floating]) -> Codes:
        """Return the code nearest to each value (BF16: to it in single precision), ties to even; NaN stays NaN."""
        if self.name != "BF16":
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = values.astype(f"f{self.bits // 8}")
            return np.ascontiguousarray(narrow).view(self.code)
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.float32)
        whole = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (whole & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        return np.where(nan, (whole >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)

    def of(self, dtype: str, codes: Codes) -> Codes:
        """Return codes of the format called `dtype` in this one, rounded where it is coarser."""
        if dtype == self.name:
            return codes
        if (dtype, self.name) == ("BF16", "F32"):
            return codes.astype(np.uint32) << np.uint32(16)
        values = codes.view(np.float32) if dtype == "F32" else FORMATS[dtype].values(codes).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.encode(values)

    def magnitude(self, codes: Codes) -> Codes:
        """Return the codes without their signs."""
        return codes & self.code.type((1 << (self.bits - 1)) - 1)

    def is_nan(self, codes: Codes) -> NDArray[np.bool_]:
        """Return which codes are NaN."""
        return self.magnitude(codes) > self.code.type((self.exponents - 1) << self.mantissa)


FORMATS = {
    f.name: f for f in (Format("BF16", 16, 7), Format("F16", 16, 10), Format("F32", 32, 23), Format("F64", 64, 52))
}
ITEM_BYTES = {
    **{name: f.bits // 8 for name, f in FORMATS.items()}, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
QUANTISED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
TORCH_NAMES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
