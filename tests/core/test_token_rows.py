"""Rows of single tokens trained in an embedding, which a tied output head follows."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from core.tiny import llama
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw
from deltaw.adapter import TokenRows
from deltaw.adapters.token_rows import TokenRowsAdapter
from deltaw.errors import ConfigError, FormatError, MergeError, StateError, TargetError
from deltaw.tokens import RowsReplaced

TOKENS = [7, 2, 9]


class Tied(nn.Module):
    """Tokens to logits by one table, with something between."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


IDS = torch.tensor([[7, 0, 2], [3, 9, 7]])


def model(dtype: torch.dtype = torch.float64, tied: bool = True) -> Tied:
    torch.manual_seed(0)
    return Tied(tied).to(dtype).eval()


def settings(**options: object) -> deltaw.LoraConfig:
    own = {"r": 2, "target_modules": ["mix"], "trainable_token_indices": {"embed": TOKENS}}
    return deltaw.LoraConfig(**(own | options))


def adapted(
    seed: int = 1, name: str = "default", on: Tied | None = None, **options: object
) -> Tied:
    """A model with rows of its own, and with ΔW in `mix`."""
    made = model() if on is None else on
    deltaw.attach(made, settings(**options), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in sorted(made.named_parameters()):
            if f".{name}." in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def rows_of(made: nn.Module, name: str = "default") -> Tensor:
    return made.embed.parts(name)["weight"].trainable_tokens_delta


def plain(made: Tied, table: Tensor) -> Tied:
    """The same without adapters, with ΔW and the table in its weights."""
    other = model()
    part = made.mix.parts("default")["weight"]
    with torch.no_grad():
        other.mix.weight.add_(part.scale * part.lora_B @ part.lora_A)
        other.head.weight = nn.Parameter(table.clone())
        other.embed.weight = other.head.weight
    return other


def table_of(made: Tied) -> Tensor:
    table = made.embed.frozen("weight").detach().clone()
    table[TOKENS] = rows_of(made).detach()
    return table


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_start_is_the_base(dtype: torch.dtype, tied: bool) -> None:
    """To the last bit, head included."""
    base = model(dtype, tied)
    expected = base(IDS)
    plan = deltaw.attach(base, settings())
    assert torch.equal(base(IDS), expected)
    assert plan is not None
    assert plan.parameters == 3 * 6 + 2 * (6 + 6) == deltaw.summary(base).trainable
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == plan.parameters
    assert "embed" in str(plan) and "3 tokens" in str(plan)
    assert deltaw.summary(base).total == sum(p.numel() for p in base.parameters())
    assert hasattr(base.head, "adapter") == tied


def test_it_is_the_model_with_another_table() -> None:
    made = adapted()
    close(made(IDS), plain(made, table_of(made))(IDS))
    with torch.no_grad():
        close(made(IDS), plain(made, table_of(made))(IDS))
    with deltaw.disabled(made):
        assert torch.equal(made(IDS), model()(IDS))


def test_only_the_rows_get_gradients() -> None:
    """Those of the whole table at these tokens, through the embedding and through the head."""
    made = adapted()
    other = plain(made, table_of(made))
    for one in (made, other):
        (one(IDS) * torch.linspace(-1, 2, 66, dtype=torch.float64).view(2, 3, 11)).sum().backward()
    close(rows_of(made).grad, other.embed.weight.grad[TOKENS])
    assert made.embed.frozen("weight").grad is None
    assert made.mix.frozen("weight").grad is None
    A = made.mix.parts("default")["weight"].lora_A
    assert A.grad is not None and A.grad.any()


def test_no_second_table_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowsReplaced, "dense", None)
    adapted()(IDS).sum().backward()


def test_two_adapters_add_up() -> None:
    made = adapted(on=adapted(), seed=2, name="second", trainable_token_indices={"embed": [9, 1]})
    deltaw.activate(made, {"default": 0.5, "second": -2.0})
    base = made.embed.frozen("weight")
    table = base.detach().clone()
    table[TOKENS] += 0.5 * (rows_of(made) - base[TOKENS]).detach()
    table[[9, 1]] -= 2.0 * (rows_of(made, "second") - base[[9, 1]]).detach()
    close(made.embed(IDS), F.embedding(IDS, table))
    x = torch.randn(4, 6, dtype=torch.float64)
    close(made.head(x), F.linear(x, table, made.head.bias))
    close(made.embed.weight.dense(), table)
    with deltaw.merged(made):
        close(made.embed(IDS), F.embedding(IDS, table))
    assert torch.equal(made.embed.frozen("weight"), base)


def test_rows_of_a_batch_under_their_own_adapters() -> None:
    made = adapted(on=adapted(), seed=2, name="second", trainable_token_indices={"embed": [9, 1]})
    expected = []
    for row, name in enumerate(("second", "default")):
        deltaw.activate(made, name)
        expected.append(made(IDS[row : row + 1]))
    with deltaw.rows(made, ["second", "default"]):
        close(made(IDS), torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", ["keep", "cpu", "file"])
def test_a_merge_writes_the_rows_and_gives_the_bits_back(
    dtype: torch.dtype, original: str, tmp_path: Path
) -> None:
    made = adapted(on=model(dtype))
    before = made.embed.frozen("weight").detach().clone()
    plain_output = made(IDS)
    path = tmp_path / "table.safetensors" if original == "file" else None
    deltaw.merge(made, original=original, path=path)
    table = made.embed.frozen("weight")
    assert made.head.frozen("weight") is table
    others = [n for n in range(11) if n not in TOKENS]
    assert torch.equal(table[TOKENS], rows_of(made).to(dtype))
    assert torch.equal(table[others], before[others])
    close(made(IDS), plain_output, 1e-5 if dtype is torch.float32 else 1e-1)
    deltaw.unmerge(made)
    assert torch.equal(made.embed.frozen("weight"), before)
    assert made.head.frozen("weight") is made.embed.frozen("weight")
    assert torch.equal(made(IDS), plain_output)


def test_a_table_that_somebody_else_holds_is_not_merged() -> None:
    made = adapted()
    around = nn.ModuleDict({"model": made, "other": nn.Linear(6, 11)})
    around["other"].weight = made.embed._parameters["weight"]
    with pytest.raises(MergeError, match=r"embed\.weight is tied to"):
        deltaw.merge(around)
    output = made(IDS)
    deltaw.merge(around, untie=True)
    close(made(IDS), output)
    deltaw.unmerge(around)
    assert around["other"].weight is made.embed._parameters["weight"] is made.head.frozen("weight")


@pytest.mark.parametrize("other", ["factors", "a copy"])
def test_a_table_that_one_owner_changes_otherwise_is_not_merged(other: str) -> None:
    made = adapted()
    options = {"target_modules": ["head"]} if other == "factors" else {"modules_to_save": ["head"]}
    deltaw.attach(made, settings(trainable_token_indices=None, **options), "second")
    deltaw.activate(made, {"default": 1.0, "second": 1.0})
    with torch.no_grad():
        for part in made.head.parts("second").values():
            for parameter in part.parameters():
                parameter.add_(0.5)
    output = made(IDS)
    with pytest.raises(MergeError, match="is tied to"):
        deltaw.merge(made)
    deltaw.merge(made, untie=True)
    close(made(IDS), output)
    deltaw.unmerge(made)
    assert torch.equal(made(IDS), output)


def test_it_is_saved_loaded_and_copied(tmp_path: Path) -> None:
    made = adapted()
    deltaw.save(made, tmp_path)
    loaded = model()
    deltaw.load(loaded, tmp_path, trainable=True)
    for other in (loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(IDS), made(IDS))
        assert other.head.parts("default")["weight"].trainable_tokens_delta is rows_of(other)
        with torch.no_grad():
            rows_of(other).add_(1.0)
        assert not torch.equal(other(IDS), made(IDS))
    states = [deltaw.capture(made), deltaw.capture(loaded)]
    assert [set(state.layers) for state in states] == [{"embed", "mix"}] * 2
    deltaw.save(adapted(seed=5), tmp_path / "other")
    deltaw.load(loaded, tmp_path / "other", swap=True)
    assert torch.equal(loaded(IDS), adapted(seed=5)(IDS))
    deltaw.detach(loaded)
    assert torch.equal(loaded(IDS), model()(IDS))
    assert type(loaded.head) is nn.Linear and type(loaded.embed) is nn.Embedding


def test_tokens_alone(tmp_path: Path) -> None:
    made = model()
    plan = deltaw.attach(made, settings(target_modules=[]))
    assert plan is not None and plan.parameters == 18
    with torch.no_grad():
        rows_of(made).add_(1.0)
    deltaw.save(made, tmp_path)
    loaded = model()
    deltaw.load(loaded, tmp_path)
    assert torch.equal(loaded(IDS), made(IDS))
    assert not torch.equal(loaded(IDS), model()(IDS))


def test_one_graph() -> None:
    torch._dynamo.reset()
    made = adapted()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    close(compiled(IDS), made(IDS))
    compiled(IDS).sum().backward()
    found = rows_of(made).grad.clone()
    made.zero_grad()
    made(IDS).sum().backward()
    close(found, rows_of(made).grad)


def test_training_moves_the_rows_alone() -> None:
    made = llama()
    base = copy.deepcopy(made)
    deltaw.attach(
        made, deltaw.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    )
    deltaw.verify(made, {"input_ids": IDS, "labels": IDS})
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)
    made(input_ids=torch.tensor([[1, 2, 5]]), labels=torch.tensor([[1, 2, 5]])).loss.backward()
    optimizer.step()
    part = made.model.embed_tokens.parts("default")["weight"]
    assert isinstance(part, TokenRowsAdapter) and "2 tokens" in str(part)
    old = base.model.embed_tokens.weight
    assert torch.equal(made.model.embed_tokens.frozen("weight"), old)
    everything = torch.arange(len(old))
    looked = made.model.embed_tokens(everything)
    changed = (looked != old).any(1).nonzero().flatten().tolist()
    assert changed == [1, 5]


def test_the_loss_without_logits_sees_the_rows() -> None:
    made = llama()
    deltaw.attach(
        made, deltaw.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    )
    with torch.no_grad():
        made.model.embed_tokens.parts("default")["weight"].trainable_tokens_delta.add_(0.5)
    batch = {"input_ids": IDS, "labels": IDS}
    expected = made(**batch).loss
    deltaw.fuse_loss(made)
    close(made(**batch).loss, expected, 1e-5)


REFUSED: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "out of range": (
        {"trainable_token_indices": {"embed": [1, 11, -1]}},
        ("embed: it has tokens 0 to 10, and no 11, -1",),
    ),
    "twice": ({"trainable_token_indices": {"embed": [1, 1]}}, ("embed: a token is named twice",)),
    "none": ({"trainable_token_indices": {"embed": []}}, ("embed: no token is named",)),
    "unknown": (
        {"trainable_token_indices": {"embedd": [1]}},
        ("trainable_token_indices 'embedd' (nearest: embed",),
    ),
    "no input embedding": ({"trainable_token_indices": [1]}, ("no input embedding is known",)),
    "another layer": (
        {"trainable_token_indices": {"mix": [1]}},
        ("mix: Linear is no embedding with a plain table",),
    ),
    "in full": (
        {"modules_to_save": ["embed"]},
        ("embed: embed is trained in full, its tokens too",),
    ),
    "adapted": ({"target_modules": ["embed"]}, ("embed: embed is adapted by factors",)),
    "an adapted head": ({"target_modules": ["head"]}, ("embed: head is adapted by factors",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    options, fragments = REFUSED[name]
    made = model()
    with pytest.raises(TargetError) as caught:
        deltaw.attach(made, settings(**options))
    for fragment in (*fragments, "Fix: "):
        assert fragment in str(caught.value)
    assert type(made.embed) is nn.Embedding


def test_a_table_that_renormalises_is_refused() -> None:
    made = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2))
    with pytest.raises(TargetError, match="max_norm renormalises"):
        deltaw.attach(
            made, deltaw.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]})
        )


@pytest.mark.parametrize("value", [["a"], {"embed": 3}, {"embed": ["b"]}, 4, [True], {1: [2]}])
def test_settings_are_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices must hold the numbers of tok"):
        deltaw.LoraConfig(trainable_token_indices=value)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    deltaw.save(adapted(), tmp_path)
    made = nn.Module()
    made.embed, made.mix = nn.Embedding(8, 5).double(), nn.Linear(6, 6).double()
    with pytest.raises(FormatError, match=r"embed: it has tokens 0 to 7, and no 9"):
        deltaw.load(made, tmp_path)
    made.embed = nn.Embedding(12, 5).double()
    with pytest.raises(FormatError, match=r"of 3 tokens: the file has \(3, 6\), .* \(3, 5\)"):
        deltaw.load(made, tmp_path)


def test_a_sum_of_whole_tables_and_rows_is_taken_together() -> None:
    made = model()
    deltaw.attach(made, settings(trainable_token_indices=None, modules_to_save=["embed"]))
    adapted(on=made, name="second")
    deltaw.activate(made, {"default": 1.0, "second": 1.0})
    with torch.no_grad():
        made.embed.parts("default")["weight"].trained.add_(1.0)
    table = made.embed.frozen("weight").detach() + 1
    table[TOKENS] = rows_of(made, "second").detach() + 1
    close(made.embed(IDS), F.embedding(IDS, table))


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_reading_is_reading_the_table(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    rows = TokenRows(torch.tensor([6, 0]), torch.randn(2, 4, generator=generator).double())
    read = RowsReplaced(W, [(rows, weight)])
    table = W.clone()
    table[rows.ids] += weight * (rows.values - W[rows.ids])
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    close(F.linear(x, read), F.linear(x, table))
    close(x @ read.T, x @ table.T)
    close(F.embedding(torch.tensor([6, 1, 0]), read), table[[6, 1, 0]])
    close(read[2:7], table[2:7])
    assert (read.shape, read.dtype, len(read), read.requires_grad) == (W.shape, W.dtype, 9, False)


def test_switching_before_backward_is_seen() -> None:
    from torch.utils.checkpoint import checkpoint

    made = adapted()
    y = checkpoint(made, IDS, use_reentrant=False).sum()
    deltaw.activate(made, None)
    with pytest.raises(StateError, match="backward"):
        y.backward()
