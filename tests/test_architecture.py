"""Who may import whom: read from the source, nested and type-only imports included."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# A row may import the rows above it. Files of one row may import each other, folders may not.
ROWS = (
    {"errors", "kernels/"},
    {"config", "state", "patterns", "folder", "marks"},
    {
        "select",
        "heads",
        "adapter",
        "copies",
        "layer",
        "authority",
        "encoders",
        "geometry",
        "mismatch",
        "offload",
        "parts",
        "readable",
        "swap",
        "rowmap",
        "rowwise",
        "storage",
        "tokens",
        "walking",
        "weight",
    },
    {"layers/", "quant/", "adapters/", "inits/", "formats/", "combine/", "optim/"},
    {
        "absorbing",
        "addition",
        "switching",
        "attaching",
        "blocks",
        "building",
        "bypassing",
        "calibrating",
        "capturing",
        "dequantizing",
        "fingerprint",
        "fitting",
        "fusing",
        "hotswap",
        "loading",
        "measuring",
        "merging",
        "mixing",
        "optimizers",
        "originals",
        "planning",
        "plans",
        "quantizing",
        "recomputing",
        "remarks",
        "root",
        "saving",
        "serving",
        "sharing",
        "snapshot",
        "stacks",
        "starting",
        "summarizing",
        "unpacking",
        "tables",
        "touching",
        "verifying",
    },
    {"__init__"},
    {"train/", "serve/", "analysis/", "compat/"},
    {"demo/", "compare/", "export/", "language/"},
    {"cli/"},
    {"__main__"},
)
CELLS = set().union(*ROWS)
# These see less than their row would allow: data and plain tensors, never a module.
DATA = {"errors", "kernels/", "config", "state", "patterns", "folder", "marks"}
NARROWER: dict[str, set[str]] = {"formats/": DATA, "combine/": DATA, "kernels/": set()}
CORE_LIBRARIES = {"torch", "safetensors"}
LIBRARIES = {
    "optim/": {"bitsandbytes"},
    "train/": {
        "accelerate",
        "datasets",
        "jinja2",
        "matplotlib",
        "numpy",
        "pyarrow",
        "pydantic",
        "rich",
        "tokenizers",
        "transformers",
        "yaml",
    },
    "quant/": {"bitsandbytes", "torchao"},
    "analysis/": {"huggingface_hub", "rich", "transformers"},
    "compat/": {"transformers"},
    "demo/": {"rich", "transformers"},
    "compare/": {"matplotlib", "rich", "scipy"},
    "export/": {"gguf", "jinja2", "transformers", "yaml"},
    "language/": {
        "datasets",
        "jinja2",
        "numpy",
        "pyarrow",
        "rich",
        "sacrebleu",
        "transformers",
        "trl",
    },
    "cli/": {"pydantic", "rich", "transformers", "typer"},
}


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    type_only: bool


def modules(source: Path) -> dict[str, Path]:
    """Dotted name -> file of every module below `source`."""
    named = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(text: str, known: set[str]) -> Iterator[Import]:
    """Every import statement of a source text, at any depth, as the modules it names."""
    tree = ast.parse(text)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            members = [f"{package}.{alias.name}" for alias in node.names]
            targets = [member if member in known else package for member in members]
        else:
            continue
        for target in dict.fromkeys(targets):
            yield Import(node.lineno, target, id(node) in guarded)


def group(module: str) -> str:
    """The cell of the table a module of deltaw belongs to: `merging`, `layers/`, `__init__`."""
    _, *inside = module.split(".")
    if not inside:
        return "__init__"
    return inside[0] + "/" if inside[0] + "/" in CELLS else inside[0]


def row(cell: str) -> int:
    rows = [number for number, cells in enumerate(ROWS) if cell in cells]
    if len(rows) != 1:
        raise ValueError(f"{cell!r} stands in {len(rows)} rows of the table, it must be in one")
    return rows[0]


def may_import(importer: str, imported: str) -> bool:
    """Whether the table lets one cell import another."""
    if importer == imported:
        return True
    if importer in NARROWER:
        return imported in NARROWER[importer]
    are_files = not importer.endswith("/") and not imported.endswith("/")
    steps_up = row(importer) - row(imported)
    return steps_up > 0 or (steps_up == 0 and are_files)


def may_use(importer: str, library: str) -> bool:
    """Whether the table lets a cell import a package that is not deltaw."""
    return library in sys.stdlib_module_names | LIBRARIES.get(importer, set()) | CORE_LIBRARIES


def violations(module: str, text: str, known: set[str]) -> list[str]:
    """The imports of one module which the tables forbid, as `module:line imports target`."""
    cell = group(module)
    found = []
    for item in imports(text, known):
        top = item.target.partition(".")[0]
        if top == "deltaw":
            allowed = item.target in known and may_import(cell, group(item.target))
        else:
            allowed = may_use(cell, top)
        if not allowed:
            found.append(f"{module}:{item.line} imports {item.target}")
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_downward_only() -> None:
    named = modules(SOURCE)
    known = set(named)
    assert [
        problem
        for module, path in named.items()
        for problem in violations(module, path.read_text("utf-8"), known)
    ] == []


def test_every_module_has_one_place_in_the_table() -> None:
    cells = {group(module) for module in modules(SOURCE)}
    assert {cell for cell in cells if sum(cell in row for row in ROWS) != 1} == set()
    assert set(NARROWER) | set(LIBRARIES) <= CELLS


def test_no_import_cycle() -> None:
    named = modules(SOURCE)
    known = set(named)
    graph = {
        module: {
            item.target
            for item in imports(path.read_text("utf-8"), known)
            if item.target in known and not item.type_only
        }
        for module, path in named.items()
    }
    assert cycle(graph) == []


KNOWN = {
    "deltaw",
    "deltaw.errors",
    "deltaw.state",
    "deltaw.attaching",
    "deltaw.merging",
    "deltaw.formats",
    "deltaw.formats.peft",
    "deltaw.layers",
    "deltaw.layers.linear",
    "deltaw.inits",
    "deltaw.inits.kaiming",
    "deltaw.train",
    "deltaw.train.run",
}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("deltaw.errors", "from deltaw import attaching"),
        ("deltaw.errors", "def late():\n    import deltaw.train.run"),
        ("deltaw.state", "if TYPE_CHECKING:\n    from deltaw.attaching import Plan"),
        ("deltaw.attaching", "import deltaw"),
        ("deltaw.attaching", "from . import errors"),
        ("deltaw.attaching", "from deltaw.nowhere import name"),
        ("deltaw.layers.linear", "from deltaw.inits import kaiming"),
        ("deltaw.formats.peft", "from deltaw.layers import linear"),
        ("deltaw.merging", "import transformers.modeling_utils"),
        ("deltaw.merging", "import torch, numpy"),
        ("deltaw.train.run", "from scipy import stats"),
    ],
)
def test_a_forbidden_import_is_found(module: str, text: str) -> None:
    assert len(violations(module, text, KNOWN)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("deltaw.attaching", "from deltaw.merging import merge"),
        ("deltaw.attaching", "import json, torch.nn, safetensors.torch"),
        ("deltaw.attaching", "from deltaw.layers import linear"),
        ("deltaw.formats.peft", "from deltaw.state import State"),
        ("deltaw.inits.kaiming", "from deltaw.inits import kaiming"),
        ("deltaw", "from deltaw.merging import merge"),
        ("deltaw.train.run", "import deltaw, transformers"),
    ],
)
def test_an_allowed_import_passes(module: str, text: str) -> None:
    assert violations(module, text, KNOWN) == []


def test_a_cycle_is_found() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
