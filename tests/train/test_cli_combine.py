"""`deltaw combine`, `resize` and `extract`: what they write and what they print."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.train.conftest import Command

import deltaw
from deltaw import combine
from deltaw.config import LoraConfig
from deltaw.formats import peft
from deltaw.state import LayerState, State


def adapter(folder: Path, r: int, seed: int, *, head: bool = False, width: int = 7) -> Path:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"h.{n}.lin": LayerState(
            "linear",
            {
                "weight.lora_A": torch.randn(r, width, generator=generator),
                "weight.lora_B": torch.randn(6, r, generator=generator),
            },
            0.5,
        )
        for n in range(2)
    }
    if head:
        layers["head"] = LayerState("module", {"weight.trained": torch.ones(3)})
    config = LoraConfig(r=r, lora_alpha=0.5 * r, modules_to_save=["head"] if head else [])
    peft.write(State(config, layers), folder)
    return folder


def delta(folder: Path, path: str) -> torch.Tensor:
    own = peft.read(folder).layers[path]
    return own.scale * own.tensors["weight.lora_B"] @ own.tensors["weight.lora_A"]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return adapter(tmp_path / "a", 2, 1), adapter(tmp_path / "b", 3, 2)


def test_a_sum_says_what_it_is_and_is_written(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, err = deltaw_command("combine", *two, "--out", out, "--weights", "0.5,-1")
    assert (code, err) == (0, "")
    assert text == (
        f"sum       0.5 x {two[0]}\n"
        f"          -1 x {two[1]}\n"
        "layer    rank  energy   error\n"
        "h.0.lin     5  100.00%   0.00%\n"
        "h.1.lin     5  100.00%   0.00%\n"
        "2 layers keep 100.00% of Σσ² at rank 5; error is ‖ΔW' - ΔW‖/‖ΔW‖\n"
        f"written   {out}: r=5, 130 parameters\n"
        f"next      deltaw inspect {out}\n"
    )
    for path in ("h.0.lin", "h.1.lin"):
        expected = 0.5 * delta(two[0], path) - delta(two[1], path)
        torch.testing.assert_close(delta(out, path), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        (["--method", "svd"], 3),
        (["--method", "svd", "--rank", "2"], 2),
        (["--method", "ties", "--density", "0.5", "--energy", "1"], 6),
        (["--method", "dare", "--density", "0.5", "--seed", "3"], 3),
        (["--method", "dare-ties", "--majority", "frequency"], 3),
        (["--method", "dare-ties", "--rank", "4"], 4),
        (["--method", "prune", "--exact"], 3),
        (["--portable"], 5),
    ],
)
def test_every_method_writes_an_adapter_of_its_rank(
    deltaw_command: Command,
    two: tuple[Path, Path],
    tmp_path: Path,
    options: list[str],
    rank: int,
) -> None:
    code, text, err = deltaw_command("combine", *two, "--out", tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert peft.read(tmp_path / "out").config.r == rank
    assert f"r={rank}, " in text


def test_ties_elects_by_frequency_on_request(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path
) -> None:
    three = (*two, adapter(tmp_path / "c", 1, 3))
    for majority in ("total", "frequency"):
        out = tmp_path / majority
        code, _, err = deltaw_command(
            "combine", *three, "--out", out, "--method", "ties", "--majority", majority,
            "--energy", "1", "--density", "1",
        )  # fmt: skip
        assert (code, err) == (0, "")
        states = [peft.read(folder) for folder in three]
        wanted = combine.ties(states, majority=majority, density=1.0, energy=1.0).state.layers[
            "h.0.lin"
        ]
        expected = wanted.tensors["weight.lora_B"] @ wanted.tensors["weight.lora_A"]
        torch.testing.assert_close(delta(out, "h.0.lin"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(delta(tmp_path / "total", "h.0.lin"), expected, atol=1e-3)


def test_heads_are_dropped_on_request(deltaw_command: Command, tmp_path: Path) -> None:
    both = [adapter(tmp_path / f"{n}", 2, n, head=True) for n in range(2)]
    code, _, err = deltaw_command("combine", *both, "--out", tmp_path / "out")
    assert code == 1
    assert "  - head.weight: 2\n" in err
    assert not (tmp_path / "out").exists()
    code, _, err = deltaw_command("combine", *both, "--out", tmp_path / "out", "--drop-copies")
    assert (code, err) == (0, "")
    assert list(peft.read(tmp_path / "out").layers) == ["h.0.lin", "h.1.lin"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "mean"], "--method must be one of sum, svd, ties, dare"),
        (["--density", "0.5"], "--density would change nothing with --method sum"),
        (["--method", "ties", "--seed", "1"], "--seed would change nothing with --method ties"),
        (["--majority", "total"], "--majority would change nothing with --method sum"),
        (["--method", "prune", "--majority", "total"], "nothing with --method prune"),
        (["--method", "ties", "--majority", "most"], "majority must be one of total, frequency"),
        (["--weights", "1,x"], "'1,x' are not numbers"),
        (["--weights", "1"], "2 adapters need as many weights, not 1"),
        (["--rank", "9"], "rank 9 is above that of every matrix"),
        (["--energy", "2"], "energy must lie in (0, 1]"),
    ],
)
def test_bad_options_write_nothing(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path, options: list[str], told: str
) -> None:
    code, out, err = deltaw_command("combine", *two, "--out", tmp_path / "out", *options)
    assert (code, out) == (1, "")
    assert told in err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for command in (
        ("combine", *two),
        ("resize", two[0], "--rank", "1"),
        ("extract", *two, "--rank", "1"),
    ):
        code, _, err = deltaw_command(*command, "--out", tmp_path / "out")
        assert code == 1
        assert "exists already. Fix: give a new folder." in err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_is_resized(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path
) -> None:
    code, text, err = deltaw_command("resize", two[1], "--out", tmp_path / "out", "--rank", "2")
    assert (code, err) == (0, "")
    M = delta(two[1], "h.0.lin")
    sigma = torch.linalg.svdvals(M)
    share = float(sigma[:2].square().sum() / sigma.square().sum())
    assert f"h.0.lin     2  {share:>6.2%}  {(1 - share) ** 0.5:>6.2%}\n" in text
    assert peft.read(tmp_path / "out").config.r == 2
    code, _, err = deltaw_command("resize", two[1], "--out", tmp_path / "other")
    assert code == 1
    assert "Neither rank nor energy is given" in err


@pytest.fixture
def tuned(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with every weight moved."""
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "tuned"))
    named = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in named.items():
        if tensor.is_floating_point():
            named[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_is_extracted_and_gives_the_tuned_model(
    deltaw_command: Command, tiny: Path, tuned: Path, tmp_path: Path
) -> None:
    base, out = tiny / "model", tmp_path / "out"
    code, text, err = deltaw_command(
        "extract", base, tuned, "--out", out, "--energy", "1", "--rest", "save"
    )
    assert (code, err) == (0, "")
    assert " other tensors changed, kept in full:\n" in text
    assert f"written   {out}: r=" in text
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    model, expected = (
        transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (base, tuned)
    )
    deltaw.load(model, out)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).last_hidden_state, expected(ids).last_hidden_state, rtol=1e-3, atol=1e-3
        )


def test_an_extraction_says_what_it_leaves_out(
    deltaw_command: Command, tiny: Path, tuned: Path, tmp_path: Path
) -> None:
    code, text, err = deltaw_command(
        "extract",
        tiny / "model",
        tuned,
        "--out",
        tmp_path / "out",
        "--rank",
        "2",
        "--targets",
        "query,value",
    )
    assert (code, err) == (0, "")
    assert " changed, left out; --rest save keeps them in full:\n" in text
    assert len(peft.read(tmp_path / "out").layers) == text.count(".query ") + text.count(".value ")
    code, _, err = deltaw_command(
        "extract",
        tiny / "model",
        tuned,
        "--out",
        tmp_path / "two",
        "--rank",
        "2",
        "--rest",
        "refuse",
    )
    assert code == 1
    assert "changed more than the targets" in err
    kept = ("--rest", "save", "--portable")
    code, _, err = deltaw_command("extract", tiny / "model", tuned, "--out", tmp_path / "z", *kept)
    assert code == 1 and "--portable cannot hold what --rest save keeps" in err


def test_dora_is_summed_and_resized_with_its_base(deltaw_command: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({f"h.{n}.lin.weight": torch.randn(6, 7) for n in range(2)}, tmp_path / "base")
    for number, name in enumerate(("org/A", "org/B")):
        layers = peft.read(adapter(tmp_path / f"lora{number}", 2, number)).layers
        m = {"weight.lora_magnitude_vector": torch.rand(6)}
        gained = {p: replace(own, tensors={**own.tensors, **m}) for p, own in layers.items()}
        config = LoraConfig(r=2, lora_alpha=1, use_dora=True, base_model_name_or_path=name)
        peft.write(State(config, gained), tmp_path / f"dora{number}")
    both = tmp_path / "dora0", tmp_path / "dora1"
    code, _, err = deltaw_command("combine", *both, "--out", tmp_path / "sum")
    assert code == 1 and "base=deltaw.combine.StoredBase(folder), or --base" in err
    with_base = ("--base", tmp_path / "base")
    code, _, err = deltaw_command("combine", *both, "--out", tmp_path / "sum", *with_base)
    assert code == 1 and "adapter 2 is for org/B, adapter 1 for org/A" in err
    code, _, err = deltaw_command(
        "combine", *both, "--out", tmp_path / "sum", "--any-base", *with_base
    )
    assert (code, err) == (0, "")
    found = peft.read(tmp_path / "sum")
    assert found.config.use_dora and found.config.r == 4
    code, _, err = deltaw_command(
        "resize", both[0], "--out", tmp_path / "cut", "--rank", 1, *with_base
    )
    assert (code, err) == (0, "") and peft.read(tmp_path / "cut").config.r == 1
    for command in (("combine", *both, "--any-base"), ("resize", both[0], "--rank", 1)):
        code, text, err = deltaw_command(
            *command, "--out", tmp_path / "plain", "--portable", *with_base
        )
        assert (code, text) == (1, "") and err.count("  - ") == 1
        assert "  - it is a DoRA, whose ΔW rescales the rows of W as well" in err
        assert "Fix: merge it into the model instead" in err and "--base" not in err
    code, _, err = deltaw_command(
        "combine", *both, "--out", tmp_path / "ties", "--method", "ties", *with_base
    )
    assert code == 1 and "--base would change nothing with --method ties" in err


def test_weights_that_the_model_calls_otherwise_are_found(
    deltaw_command: Command, tmp_path: Path
) -> None:
    """GPT-NeoX's head is `embed_out` in files, and `lm_head` in transformers."""
    config = transformers.GPTNeoXConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in load_file(tmp_path / "base" / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned")
    both, out = (tmp_path / "base", tmp_path / "tuned"), tmp_path / "out"
    told = ("--out", out, "--energy", "1", "--rest", "save")
    code, _, err = deltaw_command("extract", *both, *told)
    assert code == 0, err
    extracted = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "base").eval()
    deltaw.load(extracted, out)
    ids = torch.tensor([[1, 5, 6, 2]])
    with torch.no_grad():
        torch.testing.assert_close(extracted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    code, _, err = deltaw_command(
        "extract", both[0], both[0], "--out", tmp_path / "no", "--rank", 1
    )
    assert code == 1 and "do not differ.\nFix: give the fine-tuned model second" in err


def test_the_next_command_can_be_copied(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path
) -> None:
    _, text, _ = deltaw_command("resize", two[0], "--out", tmp_path / "my out", "--r", "1")
    assert text.splitlines()[-1] == f"next      deltaw inspect '{tmp_path}/my out'"


def test_an_adapter_without_a_run_is_merged_by_export(
    deltaw_command: Command, two: tuple[Path, Path], tmp_path: Path
) -> None:
    code, _, err = deltaw_command("merge", two[0], tmp_path / "my out")
    assert code == 1 and err.endswith(
        f"Fix: deltaw export {two[0]} '{tmp_path}/my out' --to hf --base MODEL\n"
    )


def test_files_of_stacked_experts_are_summed_and_resized(
    deltaw_command: Command, tmp_path: Path
) -> None:
    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
            num_experts=4, head_dim=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_experts_per_tok=2, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.Qwen3MoeForCausalLM(config).eval()

    def change(folder: Path) -> dict[str, torch.Tensor]:
        model = fresh()
        deltaw.load(model, folder)
        deltaw.merge(model, original="none")
        deltaw.detach(model)
        return {n: P - fresh().get_parameter(n) for n, P in model.named_parameters()}

    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for number, (r, taken) in enumerate([(2, names), (3, names[:1])]):
        model = fresh()
        config = LoraConfig(r=r, target_modules=["q_proj"], target_parameters=taken)
        deltaw.attach(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".adapter." in name:
                    parameter.normal_(std=0.3)
        deltaw.save(model, tmp_path / str(number))
    both, out = (tmp_path / "0", tmp_path / "1"), tmp_path / "out"
    code, _, err = deltaw_command("combine", *both, "--out", out, "--weights", "0.5,-1")
    assert (code, err) == (0, "")
    one, other, sums = map(change, (*both, out))
    for name, found in sums.items():
        wanted = 0.5 * one[name] - other[name]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    code, text, err = deltaw_command("resize", out, "--out", tmp_path / "cut", "--rank", 2)
    assert (code, err) == (0, "") and "mlp.experts[gate_up_proj]" in text
    assert peft.read(tmp_path / "cut").config.r == 2
