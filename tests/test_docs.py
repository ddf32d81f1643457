"""What the documentation shows runs as it stands there."""

import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw
from deltaw import folder as listing
from deltaw import layers, quant

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python(?: file=(\S+))?\n(.*?)^```$", re.M | re.S)
FOLDERS = ("adapters", "inits", "layers", "quant", "formats")


def forget() -> None:
    for cached in (listing.files_in, layers.geometries, quant.storages):
        cached.cache_clear()


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder beside deltaw's own whose files count as lying in deltaw's."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        package = importlib.import_module(f"deltaw.{name}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / name)])
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(std=0.3)


def test_every_kind_can_be_added_as_the_page_says(extended: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "adding.md").read_text()
    blocks = BLOCK.findall(text)
    assert [Path(file).parent.name for file, _ in blocks if file] == [
        "adapters",
        "inits",
        "layers",
        "quant",
        "formats",
    ]
    torch.manual_seed(0)
    for file, code in blocks:
        if file:
            (extended / file).write_text(code)
            forget()
        else:
            names = {"torch": torch, "deltaw": deltaw, "randomise": randomise, "folder": tmp_path}
            exec(compile(code, "docs/adding.md", "exec"), names)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from deltaw.demo.run import model_folder

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    blocks = [code for _, code in BLOCK.findall(text)]
    assert blocks
    names: dict[str, object] = {"MODEL": str(model_folder())}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_chinese_readme_shows_the_same_code_and_commands() -> None:
    def shown(name: str) -> list[list[str]]:
        blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / name).read_text("utf-8"), re.M | re.S)
        return [[re.sub(r"#.*", "", line).rstrip() for line in b.splitlines()] for b in blocks]

    assert shown("README.zh-CN.md") == shown("README.md")
    links = [
        sorted(set(re.findall(r"\((docs/[\w.]+)\)", (ROOT / name).read_text("utf-8"))))
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert links[0] == links[1]


def test_the_guide_to_speed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for _, code in BLOCK.findall((ROOT / "docs" / "speed.md").read_text()):
        exec(compile(code, "docs/speed.md", "exec"), names)
    assert deltaw.active(names["model"]) == {"serving": 1.0}


def test_the_guide_to_optimisers_runs() -> None:
    pytest.importorskip("transformers")
    names: dict[str, object] = {}
    for _, code in BLOCK.findall((ROOT / "docs" / "optimisers.md").read_text()):
        exec(compile(code, "docs/optimisers.md", "exec"), names)


def test_the_page_of_concepts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"torch": torch, "deltaw": deltaw, "randomise": randomise}
    blocks = BLOCK.findall((ROOT / "docs" / "concepts.md").read_text())
    assert blocks
    for _, code in blocks:
        exec(compile(code, "docs/concepts.md", "exec"), names)
    assert "% kept\n" in capsys.readouterr().out


def test_the_page_of_methods_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "methods.py"))["page"]()
    assert made == (ROOT / "docs" / "methods.md").read_text(), "run: python docs/methods.py"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
