"""Write `docs/methods.md` from the docstrings of the folders: `python docs/methods.py`."""

import importlib
from pathlib import Path

from deltaw.folder import files_in

FOLDERS = ("adapters", "inits", "layers", "kernels", "quant", "optim", "formats", "combine")
HEADER = """# Methods

What there is in each folder, in the words of its files; `python docs/methods.py` writes this page.
How to add a file is in [adding.md](adding.md), how the folders fit together in
[concepts.md](concepts.md).
"""


def page() -> str:
    """Return the page: a chapter for each folder, a section for each file in it."""
    parts = [HEADER]
    for folder in FOLDERS:
        package = importlib.import_module(f"deltaw.{folder}")
        parts.append(f"## {folder}\n\n{package.__doc__.strip()}\n")
        for name in files_in(package.__name__):
            module = importlib.import_module(f"{package.__name__}.{name}")
            parts.append(f"### {folder}/{name}.py\n\n{module.__doc__.strip()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
