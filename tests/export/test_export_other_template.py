"""mlx-lm and llama.cpp read the base's chat template, which may not be the run's."""

from pathlib import Path

import pytest
from language_models import save_adapter, save_base, tokenizer

from deltaw.export import export


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_another_chat_template_than_the_bases_is_a_warning(tmp_path: Path, to: str) -> None:
    base = save_base(tmp_path / "base")
    tokenizer("{{ messages }}").save_pretrained(base)
    source = save_adapter(tmp_path / "run", base)
    for name, template, warned in (
        ("other", "[{{ messages }}]", True),
        ("same", "{{ messages }}", False),
        ("none", None, False),
    ):
        (source / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer(template).save_pretrained(source)
        told = export(source, tmp_path / name, to=to, base=str(base))
        assert ("another chat template" in told.get("warning", "")) == warned
