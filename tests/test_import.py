"""What gets imported when: each case in an interpreter of its own."""

import json
import subprocess
import sys

import pytest

import deltaw

HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas", "sklearn")
OPTIONAL = (*HEAVY[1:], "peft", "pydantic", "rich", "typer", "yaml")


def loaded(code: str, packages: tuple[str, ...]) -> list[str]:
    """The packages of `packages` that are imported once `code` has run."""
    report = f"import json, sys; print(json.dumps([p for p in {packages!r} if p in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_deltaw_imports_no_library() -> None:
    assert loaded("import deltaw; dir(deltaw)", HEAVY) == []


def test_a_verb_imports_torch() -> None:
    assert loaded("import deltaw; deltaw.attach", HEAVY) == ["torch"]


def test_the_core_needs_torch_and_safetensors_only() -> None:
    code = "import deltaw\nfor name in deltaw.__all__: getattr(deltaw, name)"
    assert loaded(code, OPTIONAL) == []


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from deltaw.cli import main; sys.argv = ['deltaw', '--help']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code"
    )
    assert loaded(code, HEAVY) == []


def test_every_public_name_exists_and_is_listed() -> None:
    assert [name for name in deltaw.__all__ if not hasattr(deltaw, name)] == []
    assert set(deltaw.__all__) <= set(dir(deltaw))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_verb"):
        deltaw.no_such_verb  # noqa: B018
