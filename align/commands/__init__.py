"""Verbs of `align` that fill a file of their own; like align/cli.py they know every room and own no logic."""
