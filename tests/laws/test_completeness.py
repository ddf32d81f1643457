"""Every file of a folder of choices is under the laws, and the array covers what it says."""

import itertools

import pytest

from deltaw import adapters, inits
from deltaw.folder import classes_in
from deltaw.geometry import Geometry
from deltaw.layer import AdaptedLayer
from deltaw.layers.experts import Experts
from deltaw.layers.module import TrainedModule
from laws.cases import CASES, FILES
from laws.product import STARTS, alike, domains, everything, pairwise
from laws.test_absorbed_starts import STARTS as absorbed


def test_every_layer_file_has_a_case() -> None:
    assert {case.file for case in CASES} == FILES


def test_every_start_and_method_is_in_the_product() -> None:
    assert {row.init for row in pairwise()} >= set(STARTS)
    assert absorbed >= {*inits.names()} - set(STARTS)
    assert {row.method for row in pairwise()} >= set(adapters.names())


def test_no_layer_goes_past_what_every_forward_checks() -> None:
    """Rows of their own and training while merged are seen to in one place."""
    kinds = classes_in("deltaw.layers", AdaptedLayer)
    assert len(kinds) >= len(FILES)
    assert all(kind.forward is AdaptedLayer.forward for kind in kinds)


def test_every_geometry_with_slots_has_what_each_must_bring() -> None:
    """What raises `NotImplementedError` in the base class is overridden, or never asked for, as
    where the layer's own forward reads its parameters."""
    brings = [n for n, f in vars(Geometry).items() if "NotImplementedError" in names_in(f)]
    assert set(brings) == {"fits", "shape", "matrix", "layout", "act", "low_rank"}
    for kind in classes_in("deltaw.layers", AdaptedLayer):
        missing = {
            name for name in brings if "NotImplementedError" in names_in(getattr(kind, name))
        }
        runs = {"act", "low_rank"} if kind is Experts else set()
        assert missing == (set(brings) - {"fits"} if kind is TrainedModule else runs), kind


def names_in(member: object) -> tuple[str, ...]:
    code = getattr(getattr(member, "__func__", member), "__code__", None)
    return code.co_names if code is not None else ()


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_the_array_covers_every_pair_with_a_case(case) -> None:
    rows = [row for row in pairwise() if row.case is case]
    for name, values in domains(case).items():
        if name != "init":
            assert {getattr(row, name) for row in rows} == set(values)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_the_array_covers_every_start_on_every_geometry(case) -> None:
    like = alike(case)
    met = {row.init for row in pairwise() if row.case in like}
    assert met == {init for each in like for init in domains(each)["init"]}


def test_the_array_covers_every_pair_of_values() -> None:
    whole = [row for case in CASES[:3] for row in everything(case)]
    for a, b in itertools.combinations(domains(CASES[0]), 2):
        wanted = {(getattr(row, a), getattr(row, b)) for row in whole}
        assert wanted <= {(getattr(row, a), getattr(row, b)) for row in pairwise()}
