"""A package of someone else that adds rewards."""
