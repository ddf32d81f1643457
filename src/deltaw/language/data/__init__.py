"""Data files to samples: reading, detecting schemas, checking, mixing, holding rows out."""
