"""Ctrl-C and SIGTERM at any moment end a command with one line and no traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Sends the signal while `module` is imported; a careless library hides what comes of it.
COMMAND = """
import signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            try:
                signal.raise_signal({number})
            except BaseException:
                {reaction}

sys.meta_path.insert(0, Finder())
sys.argv = ["deltaw", *{arguments!r}]
from deltaw.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "reaction"),
    [
        ("deltaw.cli.app", "raise"),
        ("deltaw.train.predict", "raise"),
        ("torch", "raise"),
        ("torch", "raise ImportError('Could not import module') from None"),
        ("torch", "from deltaw.errors import RunError; raise RunError('cannot be loaded')"),
    ],
)
def test_a_signal_while_loading_is_one_line(
    tmp_path: Path, number: signal.Signals, module: str, reaction: str
) -> None:
    arguments = ["predict", str(tmp_path), "text"]
    code = COMMAND.format(module=module, number=int(number), reaction=reaction, arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (128 + number, "", "Stopped.\n")
