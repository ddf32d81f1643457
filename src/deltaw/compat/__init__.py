"""The names other libraries use, so that a script written for them runs with its import changed."""
