"""Write the second part of `docs/methods.md` from the docstrings: `python docs/methods.py`."""

import importlib
from pathlib import Path

from deltaw.folder import files_in

FOLDERS = ("adapters", "inits", "layers", "kernels", "quant", "optim", "formats", "combine")
PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- from the docstrings -->\n"


def page() -> str:
    """Return the page: its prose, then a chapter for each folder, a section for each file in it."""
    prose, mark, _ = PAGE.read_text().partition(MARK)
    parts = [prose + mark]
    for folder in FOLDERS:
        package = importlib.import_module(f"deltaw.{folder}")
        parts.append(f"### {folder}\n\n{package.__doc__.strip()}\n")
        for name in files_in(package.__name__):
            module = importlib.import_module(f"{package.__name__}.{name}")
            parts.append(f"#### {folder}/{name}.py\n\n{module.__doc__.strip()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
