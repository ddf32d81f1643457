"""Tiny language models with adapters on disk, and the command line."""

from tests.train.conftest import deltaw_command, finished, tiny

__all__ = ["deltaw_command", "finished", "tiny"]
