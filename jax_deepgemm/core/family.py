"""A family of kernels: what it says of itself, and what the machinery makes of that.

    operands' types --OpKernel.problem--> Problem
    Problem, Chip --Family.kernels_for--> Kernels of this architecture
                  --choose--> configuration: given, measured (tuning.py), or the cost model's cheapest
                  --Kernels.plan--> LaunchPlan

A family is a folder. Its modules have fixed names, and tools look them up there (tools/registry.py):

    family.py     FAMILY, a `Family`
    shapes.py     SHAPES: how a shapes file and the command line name its calls (core/shapes.py)
    bench.py      TABLES: rows of the benchmark (core/bench.py)
    sanitize.py   cases(): calls for compute-sanitizer (core/sanitize.py)

Everything below is generic: `explain`, `tune`, `precompile`, `bench` and `config=` work for whatever a family
registers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from jax_deepgemm.core import tuning
from jax_deepgemm.core.chip import GENERATIONS, Chip, best_for, described, with_sms
from jax_deepgemm.core.launch import LaunchPlan
from jax_deepgemm.jit.report import KernelSource
from jax_deepgemm.jit.toolchain import read_settings, say


class Problem(Protocol):
    """What is to be computed, as kernels see it: a frozen dataclass of numbers, words, flags and tuples of
    them. `str` says it to people."""

    def __hash__(self) -> int: ...

    @property
    def flops(self) -> int:
        """Multiplications and additions; 0 where they do not count."""
        ...


class Cost(Protocol):
    """What the cost model says of a configuration; `str` shows its terms."""

    @property
    def total(self) -> float:
        """Microseconds; configurations are compared by it."""
        ...


P = TypeVar("P", bound=Problem)
C = TypeVar("C")


@dataclass(frozen=True)
class Given:
    """An operand of the custom call: which one it is, its shape, and whether it has a batch dimension, which
    of vmap is the first (another operand of the call serves all of a batch)."""

    index: int
    shape: tuple[int, ...]
    batched: bool = False


Operands = Mapping[str, Given]
"""The operands of a call by the part that they play."""


def _nothing_broken(problem: Any, config: Any, chip: Chip) -> list[str]:
    return []


@dataclass(frozen=True)
class Kernels(Generic[P, C]):
    """A family's kernels for one target. Functions are pure.

    Attributes:
      sources: (problem, config) -> the kernels that are launched.
      plan: (problem, config, chip, operands by part) -> LaunchPlan; the configuration obeys all rules.
      config: the type of configurations, a frozen dataclass; None of kernels that run in one way only, whose
        config is None everywhere.
      candidates: (problem, chip) -> every configuration worth comparing.
      cost: (problem, config, chip) -> the model's opinion.
      broken_rules: (problem, config, chip) -> why a configuration cannot run a problem, a line for each rule.
      refusal: (problem) -> why no configuration can run it, and what to do; "" if one can.
      shared_bytes: (problem, config) -> dynamic shared memory of a block of threads.
    """

    sources: Callable[[P, C], Sequence[KernelSource]]
    plan: Callable[[P, C, Chip, Operands], LaunchPlan]
    config: type[C] | None = None
    candidates: Callable[[P, Chip], Iterable[C]] = lambda problem, chip: ()
    cost: Callable[[P, C, Chip], Cost] | None = None
    broken_rules: Callable[[P, C, Chip], list[str]] = _nothing_broken
    refusal: Callable[[P], str] = lambda problem: ""
    shared_bytes: Callable[[P, C], int] = lambda problem, config: 0


class Choice(NamedTuple):
    """A configuration, and where it is from: "given", a measurement, or "cost model"."""

    config: Any
    origin: str


@dataclass(frozen=True)
class Family(Generic[P]):
    """A family, and what follows from its declaration.

    Attributes:
      name: of the folder.
      problem: the type of its problems; a tuning file knows them by the name of the type.
      kernels: target, such as "9.0a" (see `chip.best_for`) -> module that has KERNELS, a `Kernels`. Imported
        when CUDA first asks.
    """

    name: str
    problem: type[P]
    kernels: Mapping[str, str]

    def kernels_for(self, chip: Chip) -> Kernels[P, Any]:
        """The kernels for a GPU: those of its own compute capability, or else the newest portable ones.

        Raises:
          ValueError: there are none.
        """
        target = best_for(chip.capability, self.kernels)
        if target is None:
            raise ValueError(f"{self.name}: {chip.name} has no kernels; {self.supported()}.")
        return self.kernels_of(target)

    def kernels_of(self, target: str) -> Kernels[P, Any]:
        """The kernels that are registered for just this target."""
        found: Kernels[P, Any] = importlib.import_module(self.kernels[target]).KERNELS
        return found

    def runs_on(self, capability: str) -> bool:
        """Whether there are kernels for a compute capability."""
        return capability in GENERATIONS and best_for(capability, self.kernels) is not None

    def supported(self) -> str:
        """What the kernels are for, in words.

        >>> Family("toy", object, {"9.0a": "toy.sm90"}).supported()
        'the kernels are for compute capability 9.0 (Hopper)'
        """
        return f"the kernels are for compute capability {', '.join(map(described, self.kernels))}"

    # Choosing

    def choose(self, problem: P, chip: Chip, given: Any = None) -> Choice:
        """What a problem runs with.

        Args:
          problem: of this family.
          chip: the GPU, or the part of it that may be used.
          given: the caller's `config=`, which goes before everything else.

        Raises:
          ValueError: a given configuration that breaks a rule, or a problem that none can run.
        """
        kernels = self.kernels_for(chip)
        refusal = kernels.refusal(problem)
        if refusal:
            raise ValueError(f"{problem}: no configuration fits: {refusal}.")
        if kernels.config is None:
            return Choice(None, "")
        if given is not None:
            _check_given(kernels, problem, given, chip)
            return Choice(given, "given")
        tried = tuning.tried(problem)
        if tried is not None:
            return Choice(tried, "tried")
        entry = self.measured(problem, chip)
        if entry is not None:
            return Choice(entry.config, str(entry))
        return Choice(self.cheapest(problem, chip), "cost model")

    def measured(self, problem: P, chip: Chip) -> tuning.Entry | None:
        """What the tuning file in force says of a problem, if that configuration can run it."""
        kernels = self.kernels_for(chip)
        if kernels.config is None:
            return None
        entry = tuning.lookup(
            problem, chip, kernels.config, lambda config: self.broken_rules(problem, config, chip)
        )
        return entry if entry is not None and _wanted(entry.config, chip) else None

    def broken_rules(self, problem: P, config: Any, chip: Chip) -> list[str]:
        """Why a configuration cannot run a problem on a chip: a line for each rule that it breaks."""
        kernels = self.kernels_for(chip)
        broken = kernels.broken_rules(problem, config, chip)
        needed = 0 if broken else kernels.shared_bytes(problem, config)
        if needed > chip.smem_per_block:
            broken = [f"{needed} bytes of shared memory, {chip.name} has {chip.smem_per_block}"]
        return broken

    def cheapest(self, problem: P, chip: Chip) -> Any:
        """The cheapest configuration by the cost model; the first of equals."""
        return _cheapest(self.kernels_for(chip), problem, chip)

    def ranked(self, problem: P, chip: Chip) -> list[tuple[Any, Cost]]:
        """Candidates with their cost, the cheapest first; none where there is nothing to choose."""
        kernels = self.kernels_for(chip)
        if kernels.config is None or kernels.cost is None:
            return []
        wanted = (c for c in kernels.candidates(problem, chip) if _wanted(c, chip))
        priced = [(c, kernels.cost(problem, c, chip)) for c in wanted]
        return sorted(priced, key=lambda pair: pair[1].total)

    # What follows from a choice

    def sources(self, problem: P, chip: Chip) -> Sequence[KernelSource]:
        """The kernels that would be launched."""
        return self.kernels_for(chip).sources(problem, self.choose(problem, chip).config)

    def plan(self, problem: P, chip: Chip, operands: Operands, given: Any = None) -> LaunchPlan:
        """The launches that solve a problem; says what was chosen where JAX_DEEPGEMM_PRINT_CONFIGS asks.

        Raises:
          ValueError: see `choose`.
        """
        kernels, choice = self.kernels_for(chip), self.choose(problem, chip, given)
        if kernels.cost is not None and read_settings().print_configs:
            by_model = choice.origin == "cost model"
            origin = kernels.cost(problem, choice.config, chip) if by_model else choice.origin
            say(f"{problem}: {choice.config}, {origin}")
        return kernels.plan(problem, choice.config, chip, operands)


def _check_given(kernels: Kernels[Any, Any], problem: Any, given: Any, chip: Chip) -> None:
    assert kernels.config is not None
    if not isinstance(given, kernels.config):
        broken = [f"{chip.name} takes a {kernels.config.__name__}"]
    else:
        broken = kernels.broken_rules(problem, given, chip)
    if broken:
        rules = "; ".join(broken)
        raise ValueError(
            f"config {given} cannot run {problem}: {rules}. Leave config=None to have one chosen."
        )


@functools.lru_cache(maxsize=4096)
def _cheapest(kernels: Kernels[Any, Any], problem: Any, chip: Chip) -> Any:
    assert kernels.cost is not None
    cost = kernels.cost
    wanted = [c for c in kernels.candidates(problem, chip) if _wanted(c, chip)]
    if not wanted and chip.block_n_of > 1:
        raise ValueError(
            f"{problem}: no configuration has a block_n that is a multiple of {chip.block_n_of}, which "
            "config.block_size_multiple_of asks for. Use a smaller one, such as 64, or 1 for any."
        )
    return min(wanted, key=lambda c: cost(problem, c, chip).total)


def _wanted(config: Any, chip: Chip) -> bool:
    """Whether a configuration has tiles as the user wants them; one without columns of its own has."""
    return getattr(config, "block_n", 0) % chip.block_n_of == 0


@dataclass(frozen=True)
class OpKernel:
    """What cuda runs for one op: a problem of a family.

    Attributes:
      family: whose kernels run it.
      problem: (avals_in, avals_out, *, batch, **params) -> Problem, of operands as the kernel sees them:
        vmap's levels in one leading dimension, then prepared.
      parts: what the operands are, in order; trailing ones may be missing.
    """

    family: Family[Any]
    problem: Callable[..., Any]
    parts: tuple[str, ...]

    def plan(
        self,
        avals_in: Sequence[Any],
        avals_out: Sequence[Any],
        *,
        batch: tuple[bool, ...] | None,
        chip: Chip,
        config: Any = None,
        num_sms: int | None = None,
        **params: Any,
    ) -> LaunchPlan:
        """The plan of a call."""
        problem = self.problem(avals_in, avals_out, batch=batch, **params)
        carried = self.carried(avals_in, batch, **params)
        operands = {
            part: Given(i, tuple(aval.shape), on)
            for i, (part, aval, on) in enumerate(zip(self.parts, avals_in, carried))
        }
        return self.family.plan(problem, with_sms(chip, num_sms), operands, config)

    def carried(
        self, avals_in: Sequence[Any], batch: tuple[bool, ...] | None, **params: Any
    ) -> tuple[bool, ...]:
        """Which operands have a batch dimension: of vmap, where the op has none of its own."""
        return batch or (False,) * len(avals_in)


class LazyKernel:
    """An `OpKernel` of a module that is imported when CUDA first asks: what only CUDA needs costs others
    nothing.

    Args:
      module: full name of the module.
      name: of the OpKernel in it.
      batched: whether the kernel takes a leading dimension of vmap itself, always or of the operands that
        carry it; else it is folded into another dimension, or looped over (core/batch.py).
      form: parameters that the op fixes.
    """

    def __init__(
        self,
        module: str,
        name: str,
        *,
        batched: bool | Callable[[tuple[bool, ...]], bool] = False,
        **form: Any,
    ) -> None:
        self.module, self._name, self._batched, self._form = module, name, batched, form

    def takes(self, carried: tuple[bool, ...]) -> bool:
        """Whether the kernel runs once on operands of which these have a leading dimension of vmap."""
        return self._batched if isinstance(self._batched, bool) else self._batched(carried)

    def _kernel(self) -> OpKernel:
        found: OpKernel = getattr(importlib.import_module(self.module), self._name)
        return found

    @property
    def family(self) -> Family[Any]:
        return self._kernel().family

    def plan(self, avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> LaunchPlan:
        """See `OpKernel.plan`."""
        return self._kernel().plan(avals_in, avals_out, **self._form, **params)

    def problem(self, avals_in: Sequence[Any], avals_out: Sequence[Any], **params: Any) -> Any:
        """See `OpKernel.problem`."""
        return self._kernel().problem(avals_in, avals_out, **self._form, **params)
