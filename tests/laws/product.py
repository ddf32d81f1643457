"""Layers x settings x starts: a pairwise covering array, and the whole product."""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from deltaw import adapters, inits
from deltaw.layers import geometry_of
from deltaw.planning import look
from laws.cases import BY_NAME, CASES, Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANKS = ((3, 5.0), (1, 7.0), (2, 3.0))
WHOLE = (True, "kaiming", "pissa")
"""Starts that meet everything in the whole product; biases and heads know nothing of the others."""

STARTS = [name for name in inits.names() if inits.kind_of(name) != "from_packed"]
"""The starts that leave W as it is; for the others see `test_absorbed_starts.py`."""


@dataclass(frozen=True)
class Setting:
    """One point of the product."""

    case: Case
    dtype: torch.dtype = torch.float32
    rank: tuple[int, float] = (3, 5.0)
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    lora_bias: bool = False
    head: bool = False
    init: bool | str = True
    method: str = "lora"

    def __post_init__(self) -> None:
        if self.case.packed and self.dtype is torch.float64:
            object.__setattr__(self, "dtype", torch.float32)

    def __str__(self) -> str:
        marks = [
            str(self.dtype).removeprefix("torch."),
            f"r{self.rank[0]}",
            "rslora" * self.rslora,
            "dropout" * (self.dropout > 0),
            self.bias * (self.bias != "none"),
            "lora_bias" * self.lora_bias,
            "head" * self.head,
            str(self.init) * (self.init is not True),
            self.method * (self.method != "lora"),
        ]
        return "-".join([self.case.name, *filter(None, marks)])

    def but(self, **changes: object) -> "Setting":
        """The same with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """s, worked out here."""
        r, alpha = self.rank
        return alpha / r**0.5 if self.rslora else alpha / r

    @property
    def mergeable(self) -> bool:
        """Whether a merge is possible at all."""
        bare = self.lora_bias and not self.case.biases()
        return self.case.mergeable and not bare


def setting(name: str, **values: object) -> Setting:
    """A setting of a case by its name."""
    return Setting(BY_NAME[name], **values)  # type: ignore[arg-type]


@functools.cache
def fits(case: Case, init: bool | str, r: int) -> bool:
    """Whether a start of that rank can be had on the layer of a case."""
    if case.form != "config":
        return True
    geometry = geometry_of(layer := case.layer())
    assert geometry is not None
    seen, zero = look(layer, geometry), geometry.zero_factor
    shape, matrix = seen.shape, seen.matrix
    sites = [
        inits.Site(
            "layer", "layer", shape(slot), r, 1.0, zero, None, functools.partial(matrix, slot)
        )
        for slot in seen.slots(case.enabled)
    ]
    return not any(inits.refusal(init, site) for site in sites)


def ranks(case: Case, init: bool | str) -> tuple[tuple[int, float], ...]:
    """The first two ranks that a start can have on the layer of a case."""
    return tuple(rank for rank in RANKS if fits(case, init, rank[0]))[:2]


def domains(case: Case) -> dict[str, tuple[object, ...]]:
    """The values that make sense with a case."""
    plain: dict[str, tuple[object, ...]] = {
        "dtype": DTYPES,
        "rank": RANKS[:1],
        "rslora": (False,),
        "dropout": (0.0,),
        "bias": ("none",),
        "lora_bias": (False,),
        "head": (False,),
        "init": (True,),
        "method": ("lora",),
    }
    if case.form != "module":
        plain |= {"rank": RANKS[:2], "rslora": (False, True), "dropout": (0.0, 0.25)}
    if case.packed:
        plain |= {"dtype": DTYPES[:3]}
    if case.form == "parameter":
        plain |= {"dropout": (0.0,), "init": (True, "gaussian")}
    if case.form == "factored":  # loralib has alpha / r alone
        plain |= {"rslora": (False,)}
    if case.form in ("config", "module", "parameter"):
        plain |= {"bias": ("none", "all", "lora_only"), "head": (False, True)}
    if case.form == "config":
        names = [name for name in STARTS if not case.packed or inits.at_zero(name)]
        if case.file == "attention":
            names = [name for name in names if not inits.from_data(name)]
        known = {rank for init in names for rank in ranks(case, init)}
        plain |= {"init": tuple(names), "method": tuple(adapters.names())}
        plain |= {"rank": tuple(rank for rank in RANKS if rank in known)}
    if case.form == "config" and not isinstance(case.layer(), nn.Embedding):
        plain |= {"lora_bias": (False, True)}
    return plain


def everything(case: Case) -> Iterator[Setting]:
    """The whole product of one case."""
    for values in itertools.product(*domains(case).values()):
        row = Setting(case, *values)  # type: ignore[arg-type]
        bare = row.bias == "none" and not row.head and not row.lora_bias
        if row.rank in ranks(case, row.init) and (bare or row.init in WHOLE):
            yield row


@functools.cache
def pairwise() -> tuple[Setting, ...]:
    """Settings in which any two values that go together do so at least once."""
    rng = random.Random(0)
    open_ = {pair for case in CASES for pair in _all_pairs(case)}
    rows = []
    for case in CASES:
        while own := sorted((p for p in open_ if (0, case.name) in p), key=repr):
            candidates = [_filled(case, own[0], rng) for _ in range(20)]
            best = max(candidates, key=lambda row: len(_pairs(row) & open_))
            open_ -= _pairs(best)
            rows.append(best)
    while open_:
        pair = min(open_, key=repr)
        cases = [case for case in CASES if pair in _all_pairs(case)]
        row = _filled(rng.choice(cases), pair, rng)
        open_ -= _pairs(row)
        rows.append(row)
    return tuple(rows)


Pair = tuple[tuple[int, object], ...]


def _filled(case: Case, pair: Pair, rng: random.Random) -> Setting:
    fixed = dict(pair)
    while True:
        values = [
            fixed.get(place, rng.choice(values))
            for place, values in enumerate(domains(case).values(), start=1)
        ]
        row = Setting(case, *values)  # type: ignore[arg-type]
        if row.rank in ranks(case, row.init):
            return row


def _pairs(row: Setting) -> set[Pair]:
    values = [row.case.name, *(getattr(row, field.name) for field in fields(row)[1:])]
    return set(itertools.combinations(enumerate(values), 2))


@functools.cache
def _all_pairs(case: Case) -> frozenset[Pair]:
    columns = [(case.name,), *domains(case).values()]
    names = [field.name for field in fields(Setting)]
    init = names.index("init")
    at = names.index("rank"), init
    return frozenset(
        ((i, a), (j, b))
        for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2)
        for a, b in itertools.product(first, second)
        if (i, j) != at or a in ranks(case, b)  # type: ignore[arg-type]
        if (i, j) != (0, init) or case in starting(b, alike(case))  # type: ignore[arg-type]
    )


def alike(case: Case) -> tuple[Case, ...]:
    """The cases of one geometry and way to store W, which starts cannot tell apart."""
    return tuple(c for c in CASES if (c.file, c.packed) == (case.file, case.packed))


@functools.cache
def starting(init: bool | str, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Two of these cases, by turns, that a start meets, if it goes with so many."""
    able = [case for case in cases if init in domains(case)["init"]]
    turn = sum(map(ord, str(init)))
    return tuple(able[(turn + step) % len(able)] for step in range(min(2, len(able))))
