"""How much of a model an update moved, and how much of that rounding alone would show."""

FORMS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Formats of weights, by the names that configs and flags have for them: as safetensors calls them."""
