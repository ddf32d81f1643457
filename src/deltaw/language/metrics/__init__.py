"""Scores of answers beside their references, one file per metric."""
