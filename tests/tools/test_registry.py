"""What every registered family must have, so that tools can walk the registry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import jax_deepgemm
from jax_deepgemm.core.chip import GENERATIONS, chip_for
from jax_deepgemm.core.family import Family, Kernels
from jax_deepgemm.tools import registry
from jax_deepgemm.tools.explain import problems
from jax_deepgemm.tools.shape_files import kinds

FAMILIES = registry.families()
each_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
OPS = Path(jax_deepgemm.__file__).parent / "ops"


def kernels_of(family: Family) -> list[Kernels]:
    return [family.kernels_of(target) for target in family.kernels]


def test_every_folder_of_ops_is_registered() -> None:
    folders = {path.parent.name for path in OPS.glob("*/__init__.py")}
    assert {folder.rpartition(".")[2] for folder in registry.FOLDERS if ".ops." in folder} == folders


@each_family
def test_problems_and_configurations_are_plain_data(family: Family) -> None:
    for kind in [family.problem, *(kernels.config for kernels in kernels_of(family))]:
        if kind is not None:
            assert kind.__dataclass_params__.frozen
            assert kind.__hash__ is not None


@each_family
def test_every_architecture_is_in_the_table_of_chips(family: Family) -> None:
    for target in family.kernels:
        capability = target.rstrip("a")
        chip = chip_for(GENERATIONS[capability].arch)
        assert family.runs_on(capability)
        assert family.kernels_for(chip) is family.kernels_of(target)
        assert family.runs_on("10.0") == (not target.endswith("a"))


@pytest.mark.parametrize("op", [op for op, kind in kinds().items() if not kind.LAYER])
def test_a_problem_from_a_shapes_file_is_json_and_has_a_choice(op: str) -> None:
    fields = {one.name: 256 for one in dataclasses.fields(kinds()[op]) if one.default is dataclasses.MISSING}
    [call] = kinds()[op](**fields | {"op": op} | {name: 4 for name in fields if name == "groups"}).calls()
    [(problem, chip)] = problems(call.function, *call.operands)
    family = registry.family_of(problem)
    assert family is not None
    assert (
        type(problem)(**json.loads(json.dumps(dataclasses.asdict(problem)), object_hook=_tuples)) == problem
    )
    choice = family.choose(problem, chip)
    assert family.broken_rules(problem, choice.config, chip) == []
    assert choice.config == family.ranked(problem, chip)[0][0]
    assert json.dumps(dataclasses.asdict(choice.config))
    assert registry.family_named(f"{type(problem).__name__} m=1") is family


def _tuples(fields: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
