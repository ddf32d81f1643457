"""Data files to clean examples: reading, detecting columns, checking, holding rows out."""
