"""An adapter with a reserve takes others of its rank or less, in place and without compiling."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import deltaw
from deltaw.adapters._reserved import ReservedLora
from deltaw.errors import StateError
from laws.building import adapt, assert_same_state, base, base_state, fill, parts
from laws.cases import CASES, Case, Stack
from laws.product import Setting, setting
from laws.running import over_cases
from laws.test_law03_oracle import close

RANKS = ((2, 5.0), (4, 3.0), (1, 4.0), (4, 1.0))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Each test compiles from scratch."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def reservable(case: Case) -> bool:
    mergeable = case.name not in ("embedding-max-norm", "linear-without-bias")
    return case.form == "config" and not case.name.startswith("spanning") and mergeable


def written(setting: Setting, folder: Path) -> list[Path]:
    """Adapters of several ranks and scales on disk."""
    files = []
    for seed, rank in enumerate(RANKS):
        own = setting.but(rank=rank)
        files.append(folder / str(seed))
        deltaw.save(fill(adapt(base(own), own), seed=seed), files[-1])
    return files


def plain(setting: Setting, file: Path) -> nn.Module:
    """The base with the adapter of one file, without any reserve."""
    model = base(setting)
    deltaw.load(model, file)
    return model


# dynamo itself makes an object of the autograd function of bitsandbytes' int8
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@over_cases(reservable)
def test_in_place_of_another(case: Case, tmp_path: Path) -> None:
    in_place_of_another(case, tmp_path)


def in_place_of_another(case: Case, folder: Path) -> None:
    """Outputs, states and merged weights are those of a plain load, in one compiled graph."""
    s = Setting(case, torch.float64, lora_bias=case.file == "linear")
    x = case.x(s.dtype)
    files = written(s, folder)
    model = base(s)
    deltaw.load(model, files[0], reserve=4)
    before = base_state(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for file in (files[0], *files):
            deltaw.load(model, file, swap=True)
            alike = plain(s, file)
            close(model(x), alike(x), 1e-12)
            close(compiled(x), alike(x), 1e-12)
            same_state(deltaw.capture(model), deltaw.capture(alike))
            with deltaw.merged(model), deltaw.merged(alike):
                assert torch.equal(model(x), alike(x))
    assert counter.frame_count == 1
    assert_same_state(base_state(model), before)


def same_state(a: deltaw.State, b: deltaw.State) -> None:
    """Both hold the same layers, scales and bits."""
    assert a.config == b.config and a.base == b.base
    assert a.layers.keys() == b.layers.keys()
    for path, layer in a.layers.items():
        assert layer.scale == b.layers[path].scale
        assert layer.tensors.keys() == b.layers[path].tensors.keys()
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor, b.layers[path].tensors[name]), (path, name)


def stack(targets: Sequence[str], r: int, seed: int) -> Stack:
    torch.manual_seed(0)
    model = Stack().eval()
    enabled = {"fused": [True, False, True]} if "fused" in targets else None
    config = deltaw.LoraConfig(r=r, lora_alpha=5, target_modules=targets, enable_lora=enabled)
    deltaw.attach(model, config)
    fill(model, seed=seed)
    return model


def test_layers_that_come_and_go(tmp_path: Path) -> None:
    """An adapter of some of the layers leaves the others as the base has them."""
    wanted = (["embed", "up", "fused", "gpt2"], ["up"], ["fused", "gpt2"], ["embed"])
    models = [stack(names, seed + 1, seed) for seed, names in enumerate(wanted)]
    for seed, alike in enumerate(models):
        deltaw.save(alike, tmp_path / str(seed))
        deltaw.detach(alike)
        deltaw.load(alike, tmp_path / str(seed))
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randint(0, 11, (2, 7))
    deltaw.load(model, tmp_path / "0", reserve=4)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for seed in (0, 1, 2, 3, 0):
            deltaw.load(model, tmp_path / str(seed), swap=True)
            for run in (model, compiled):
                close(run(x), models[seed](x), 1e-5)
            same_state(deltaw.capture(model), deltaw.capture(models[seed]))
    assert counter.frame_count == 1


@over_cases(reservable)
def test_a_layer_that_the_new_adapter_leaves_out(case: Case, tmp_path: Path) -> None:
    """It is the base's again."""
    s = Setting(case, lora_bias=case.file == "linear")
    model, x = base(s), case.x(s.dtype)
    deltaw.load(model, written(s, tmp_path)[0], reserve=4)
    for part in parts(model):
        assert isinstance(part, ReservedLora)
        part.clear()
    with torch.no_grad():
        close(model(x), base(s)(x), 1e-5)


def test_rows_of_reserved_adapters(tmp_path: Path) -> None:
    s = setting("linear").but(dtype=torch.float64)
    files = written(s, tmp_path)
    model = base(s)
    for name, file in zip("ab", files, strict=False):
        deltaw.load(model, file, name, reserve=4)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad(), deltaw.rows(model, ["b", "a"]):
        for _ in range(3):
            y = model(x)
            close(y[0], plain(s, files[1])(x)[0], 1e-12)
            close(y[1], plain(s, files[0])(x)[1], 1e-12)


def unchanged(model: nn.Module, x: Tensor, change: object, match: str) -> None:
    """The change raises, and leaves output and settings as they are."""
    before, config = model(x), deltaw.configs(model)
    with pytest.raises(StateError, match=match):
        change()  # type: ignore[operator]
    assert torch.equal(model(x), before)
    assert deltaw.configs(model) == config


def test_what_has_no_room(tmp_path: Path) -> None:
    """Everything is listed, and nothing is changed."""
    for number, (names, r) in enumerate(((["up", "gpt2"], 2), (["up", "embed"], 3))):
        deltaw.save(stack(names, r, 0), tmp_path / str(number))
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randint(0, 11, (2, 7))
    deltaw.load(model, tmp_path / "0", reserve=2)

    def swap() -> None:
        deltaw.load(model, tmp_path / "1", swap=True)

    unchanged(model, x, swap, r"embed: the adapter that is there has no part in it")
    unchanged(model, x, swap, r"up: rank 3, reserved are 2")
    unchanged(model, x, swap, r"larger reserve")

    def train() -> None:
        deltaw.load(model, tmp_path / "0", swap=True, trainable=True)

    unchanged(model, x, train, "it would be trained")


def test_what_cannot_be_reserved(tmp_path: Path) -> None:
    s = setting("linear")
    file = written(s, tmp_path)[1]
    model = base(s)
    with pytest.raises(StateError, match=r"layer: rank 4 is above reserve=3"):
        deltaw.load(model, file, reserve=3)
    with pytest.raises(StateError, match=r"reserve=4: it would be trained"):
        deltaw.load(model, file, reserve=4, trainable=True)
    with pytest.raises(StateError, match=r"reserve=0"):
        deltaw.load(model, file, reserve=0)
    assert not hasattr(model.layer, "adapter")
    spanning = next(case for case in CASES if case.name.startswith("spanning"))
    own = Setting(spanning)
    deltaw.save(fill(adapt(base(own), own)), tmp_path / "spanning")
    with pytest.raises(StateError, match="blocks of one rank"):
        deltaw.load(base(own), tmp_path / "spanning", reserve=64)


def test_a_full_copy_does_not_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randint(0, 11, (2, 7))
    config = deltaw.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    deltaw.attach(model, config)
    deltaw.save(fill(model), tmp_path / "0")
    deltaw.save(stack(["up"], 2, 0), tmp_path / "1")
    deltaw.detach(model)
    deltaw.load(model, tmp_path / "0", reserve=2)
    unchanged(
        model,
        x,
        lambda: deltaw.load(model, tmp_path / "1", swap=True),
        r"head\.dense\.bias: is trained in full, and the new adapter has none of it",
    )


def test_lean_factors(tmp_path: Path) -> None:
    """In the dtype asked for, which a swap keeps; trained ones are in float32."""
    s = setting("linear").but(dtype=torch.bfloat16)
    files = written(s, tmp_path)
    model, x = base(s), s.case.x(s.dtype)
    deltaw.load(model, files[0], dtype=torch.bfloat16)
    for file in (files[0], files[1]):
        deltaw.load(model, file, swap=True)
        assert {p.dtype for part in parts(model) for p in part.parameters()} == {torch.bfloat16}
        close(model(x), plain(s, file)(x), 1e-2)
    deltaw.load(model, files[1], swap=True, trainable=True)
    assert {p.dtype for part in parts(model) for p in part.parameters()} == {torch.float32}
    assert not any(isinstance(part, ReservedLora) for part in parts(model))
    with pytest.raises(StateError, match="it would be trained"):
        deltaw.load(model, files[0], "more", dtype=torch.bfloat16, trainable=True)
    with pytest.raises(StateError, match="floating-point"):
        deltaw.load(model, files[0], "more", dtype=torch.int8)


def test_a_checkpoint_is_refused() -> None:
    """It holds neither rank nor scale; the base's own loads."""
    s = setting("linear")
    model = adapt(base(s), s)
    with TemporaryDirectory() as folder:
        deltaw.save(model, folder)
        deltaw.detach(model)
        plain_state = base(s).state_dict()
        deltaw.load(model, folder, reserve=6)
    with pytest.raises(StateError, match="rank and scale"):
        model.load_state_dict(model.state_dict())
    model.load_state_dict(plain_state, strict=False)


def test_a_lean_adapter_merges_in_full_precision(tmp_path: Path) -> None:
    """The factors are bfloat16 numbers; the sum is rounded once, to the base's dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        s = setting("linear").but(dtype=dtype, lora_bias=True)
        deltaw.save(fill(adapt(base(s), s)), tmp_path / str(dtype))
        model = base(s)
        W = model.layer.weight.detach().double()
        deltaw.load(model, tmp_path / str(dtype), dtype=torch.bfloat16)
        part = next(parts(model))
        delta = part.scale * part.lora_B.double() @ part.lora_A.double()
        deltaw.merge(model)
        error = (model.layer._parameters["weight"].double() - (W + delta)).abs().max()
        assert error <= torch.finfo(dtype).eps * (W + delta).abs().max()


def test_rows_without_any_rank(tmp_path: Path) -> None:
    """Adapters that have no part in a layer add nothing to their rows."""
    for number, names in enumerate((["up", "gpt2"], ["up"])):
        deltaw.save(stack(names, 2, number), tmp_path / str(number))
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randint(0, 11, (4, 7))
    for name in "ab":
        deltaw.load(model, tmp_path / "0", name, reserve=3)
        deltaw.load(model, tmp_path / "1", name, swap=True)
    with torch.no_grad():
        expected = model(x)
        for names in (["a", "b", "a", "b"], ["a", "a", "b", "b"]):
            with deltaw.rows(model, names):
                for _ in range(3):
                    close(model(x), expected, 1e-5)


def test_a_reserve_is_not_lost_in_silence(tmp_path: Path) -> None:
    s = setting("linear").but(dtype=torch.bfloat16)
    files = written(s, tmp_path)
    model = base(s)
    deltaw.load(model, files[0], reserve=4, dtype=torch.bfloat16)
    for options in ({"trainable": True}, {"reserve": 8}, {"dtype": torch.float32}):
        with pytest.raises(StateError, match="has no room"):
            deltaw.load(model, files[1], swap=True, **options)
    assert all(isinstance(part, ReservedLora) for part in parts(model))
