"""The verbs of `align`. They know every room and own no logic; align/cli.py has the parser."""
