"""How much of a model an update moved, and how much of that rounding alone would show."""
