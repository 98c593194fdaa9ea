"""Scores, their intervals and tests, and the pages that show them; the command is `clusterns/evaluate.py`."""
