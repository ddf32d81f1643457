"""Settings in `adapter_config.json` that cannot be read or done."""

from pathlib import Path

import pytest
from peft_folders import CONFIG, folder_of, pair, refusal


@pytest.mark.parametrize(
    ("key", "value", "feature"),
    [
        ("use_qalora", True, "QA-LoRA"),
        ("layer_replication", [[0, 1]], "layer replication"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("velora_config", {"scale": 1}, "VeLoRA"),
        ("monteclora_config", {"a": 1}, "MonteCLoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("ensure_weight_tying", True, "tied"),
        ("enable_lora", [True, False], "fused"),
    ],
)
def test_features_that_are_missing_are_named(
    key: str, value: object, feature: str, tmp_path: Path
) -> None:
    message = refusal(folder_of(tmp_path, CONFIG | {key: value}, pair("h.q")))
    assert key in message and feature in message and "adapter_config.json" in message


def test_all_wrong_settings_are_listed_at_once(tmp_path: Path) -> None:
    wrong = {
        "r": "8",
        "lora_alpha": True,
        "target_modules": [1],
        "alpha_pattern": {"q": "x"},
        "rank_pattern": [1],
        "bias": None,
        "lora_dropout": 10**400,
        "use_dora": "yes",
    }
    message = refusal(folder_of(tmp_path, CONFIG | wrong, pair("h.q")))
    assert message.count("\n  - ") == len(wrong)
    for key in wrong:
        assert key in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"r": 0}, "r must be a whole number above 0"),
        ({"lora_alpha": -1}, "lora_alpha must be a number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie in [0, 1)"),
        ({"bias": "some"}, "bias must be one of"),
    ],
)
def test_settings_out_of_range_name_the_file(
    setting: dict[str, object], message: str, tmp_path: Path
) -> None:
    assert message in refusal(folder_of(tmp_path, CONFIG | setting, pair("h.q")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"peft_type": "LORA",\n "r": }', "adapter_config.json:2: not JSON"),
        (b'{"peft_type": "LORA",\n "r": "\xff"}', "adapter_config.json:2: not UTF-8: byte 0xff"),
        (b"", "adapter_config.json:1: not JSON"),
        (b"[1]", "adapter_config.json:1: expected a JSON object, found list"),
        (b"[" * 100_000, "not a JSON file of settings"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not a JSON file of settings"),
        (b"{}", "has no peft_type"),
        (b'{"peft_type": "IA3"}', "peft_type is 'IA3'; only 'LORA' is read"),
        (b'{"peft_type": ["LORA"]}', "peft_type is ['LORA']"),
        (b'{"fine_tune_type": "lora"}', "MLX's adapter format"),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_its_line(
    text: bytes, message: str, tmp_path: Path
) -> None:
    assert message in refusal(folder_of(tmp_path, text, pair("h.q")))


@pytest.mark.parametrize("pattern", ["(a+)+b", "[", "[ab]" * 300])
def test_a_pattern_of_alpha_that_cannot_be_used_is_an_error(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaw.patterns.SECONDS", 0.5)
    config = CONFIG | {"alpha_pattern": {pattern: 9}}
    message = refusal(folder_of(tmp_path, config, pair("h." + "a" * 60)))
    assert "alpha_pattern" in message
