"""Recipes: one YAML file each, listed by `align configs`."""
