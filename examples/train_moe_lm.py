"""Trains a small mixture-of-experts language model in BF16 and in FP8 from equal seeds and compares losses.

    pip install '.[flax]'                                      # in the clone; with a GPU '.[cuda13,flax]'
    python examples/train_moe_lm.py                            # tiny: a CPU, two minutes
    python examples/train_moe_lm.py --config h200              # 64 experts, 1.7e9 parameters: one H200
    python examples/train_moe_lm.py --config h200 --attention cudnn          # the same, attention by cuDNN
    python examples/train_moe_lm.py --config h200 --mesh 2x2   # four: data x expert

The batch is cut over both axes of the mesh, the experts of every layer over `expert`; everything else is
replicated. On a CPU, as many host devices are made as the mesh needs.

One process per GPU, here two on one machine:

    for rank in 0 1; do
        CUDA_VISIBLE_DEVICES=$rank python examples/train_moe_lm.py --config h200 --mesh 1x2 --distributed \
            --coordinator localhost:9876 --processes 2 --process $rank &
    done
    wait

COORDINATOR, PROCESSES and PROCESS in the environment do the same as the three flags, for launchers of jobs.

Writes curves.json and loss.png to --out, and with --save the trained weights, which decode_moe.py reads.
Prints PASS if the mean loss of the last tenth of the steps in FP8 is at most 1 % above BF16's. With --recipes
bf16,fp8,fp8-128x128 FP8 is also run with the faster weight gradients: at most 0.5 % above FP8's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

try:
    import optax
    from flax import nnx
except ImportError as error:
    sys.exit(f"{error}. Install it in the clone: pip install '.[flax]' (with a GPU: '.[cuda13,flax]')")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_lm import ATTENTIONS, CONFIGS, Config, LanguageModel, batches, parameter_count, standard_library

from jax_deepgemm.cli.arguments import Parser, above_zero, names_of, output_folder, whole
from jax_deepgemm.flax import Load, named_shardings
from jax_deepgemm.tools.text import Progress

COMPARED = (("fp8", "bf16", 0.01), ("fp8-128x128", "fp8", 0.005))
"""Recipes, what their final losses are compared with, and by how much they may differ."""
RECIPES = ("bf16", "fp8", "fp8-128x128")
BATCH_CUT = P(("data", "expert"))


@dataclasses.dataclass
class Curve:
    """What one run leaves.

    Attributes:
      loss: mean cross-entropy of each step, in nats per byte.
      tokens_per_second: over all devices, without the first step, which compiles.
      first_step_seconds: compiling included.
      memory_gb: of a device during a step: state, temporary buffers and results.
      largest_load: of each step, the load of the fullest expert over the mean load; 1 is balance.
      dropped: of each step, copies of tokens that found no room at their expert (see --capacity-factor).
    """

    loss: list[float]
    tokens_per_second: float
    first_step_seconds: float
    memory_gb: float
    largest_load: list[float]
    dropped: list[float]

    def final(self) -> float:
        """Mean loss of the last tenth of the steps."""
        return float(np.mean(self.loss[-math.ceil(len(self.loss) / 10) :]))


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = whole(1, 2**31 - 1)
    parser.add_argument("--config", choices=CONFIGS, default="tiny")
    parser.add_argument("--steps", type=number, help="optimizer steps (default: the configuration's)")
    parser.add_argument("--layers", type=number, help="blocks of the model (default: the configuration's)")
    parser.add_argument("--batch", type=number, help="sequences of a step (default: the configuration's)")
    parser.add_argument(
        "--attention", choices=ATTENTIONS, help="cudnn: of GPUs, no scores in memory (default: xla)"
    )
    parser.add_argument(
        "--method", choices=("all_to_all", "ragged"), help="how tokens travel to their experts"
    )
    parser.add_argument(
        "--capacity-factor", type=above_zero, help="room for them, 1: a balanced load (default: any)"
    )
    parser.add_argument(
        "--mesh", type=mesh_shape, metavar="DATAxEXPERT", help="devices (default: all, 1 x all)"
    )
    parser.add_argument(
        "--recipes",
        type=names_of(RECIPES, "recipe"),
        default=["bf16", "fp8"],
        help="of bf16, fp8 and fp8-128x128, which has faster weight gradients (default bf16,fp8)",
    )
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0)
    parser.add_argument("--out", type=output_folder, default=Path("out"), help="folder for results")
    parser.add_argument("--save", action="store_true", help="also write the trained weights (float32)")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes")
    environment = os.environ.get
    parser.add_argument("--coordinator", default=environment("COORDINATOR"), help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=number, default=environment("PROCESSES"))
    parser.add_argument(
        "--process", type=whole(0, 2**31 - 1), default=environment("PROCESS"), help="this one's number"
    )
    return parser


def mesh_shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"got {text!r}, need two numbers of devices, as 2x2")
    return int(sizes[0]), int(sizes[1])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.distributed and None in (args.coordinator, args.processes, args.process):
        parser.error("argument --distributed: needs --coordinator, --processes and --process")
    return args


def start(args: argparse.Namespace) -> Mesh:
    """Starts JAX, with other processes if asked, and makes the mesh."""
    wanted = math.prod(args.mesh) if args.mesh else 1
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", -(-wanted // (args.processes if args.distributed else 1)))
    if args.distributed and os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.distributed:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    shape = args.mesh or (1, jax.device_count())
    if math.prod(shape) > jax.device_count():
        make_parser().error(
            f"argument --mesh: needs {math.prod(shape)} devices, there are {jax.device_count()}: "
            f"{jax.devices()}"
        )
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "expert"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    peak, warmup = config.learning_rate, min(config.warmup, config.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1))


State = tuple[Any, Any, Any]
"""Parameters, other variables (the routers' biases), the optimizer's state."""


class Training:
    """Model and optimizer on a mesh; parameters and moments are float32, the experts' cut over `expert`."""

    def __init__(self, config: Config, recipe: str, mesh: Mesh, seed: int) -> None:
        self.config, self.recipe, self.mesh, self.seed = config, recipe, mesh, seed
        self.optimizer = make_optimizer(config)
        self.graph, *_ = nnx.split(nnx.eval_shape(self.build), nnx.Param, ...)
        self.abstract = jax.eval_shape(self.initial)
        self.shardings = self.place(*self.abstract)
        self.tokens = NamedSharding(mesh, BATCH_CUT)
        replicated = NamedSharding(mesh, P())
        self.program = jax.jit(self.update, donate_argnums=0, out_shardings=(self.shardings, replicated))
        self.compiled: Any = None

    def build(self) -> LanguageModel:
        mesh = self.mesh if self.mesh.size > 1 else None  # nothing travels on one device
        return LanguageModel(self.config, recipe=self.recipe, mesh=mesh, rngs=nnx.Rngs(self.seed))

    def initial(self) -> State:
        _, params, rest = nnx.split(self.build(), nnx.Param, ...)
        return params, rest, self.optimizer.init(params)

    def place(self, params: Any, rest: Any, moments: Any) -> State:
        """Shardings of the state; the optimizer's moments are cut as their parameters."""
        cut = named_shardings(params, self.mesh)
        like = optax.tree.map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            moments,
            cut,
            transform_non_params=lambda _: NamedSharding(self.mesh, P()),
        )
        return cut, named_shardings(rest, self.mesh), like

    def start(self) -> None:
        self.state = jax.jit(self.initial, out_shardings=self.shardings)()

    def loss(self, params: Any, rest: Any, tokens: jax.Array) -> tuple[jax.Array, Load]:
        """Mean cross-entropy of all tokens but the first."""
        logits, load = nnx.merge(self.graph, params, rest)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), load

    def update(self, state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        """One step: the new state; [loss, largest load of an expert over the mean load, copies dropped]."""
        params, rest, moments = state
        (loss, load), gradients = jax.value_and_grad(self.loss, has_aux=True)(params, rest, tokens)
        updates, moments = self.optimizer.update(gradients, moments, params)
        model = nnx.merge(self.graph, optax.apply_updates(params, updates), rest)
        model.move_biases(load)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        share = load.tokens / load.tokens.mean(axis=-1, keepdims=True)
        return (params, rest, moments), jnp.stack([loss, share.max(), load.dropped.sum()])

    def step(self, tokens: np.ndarray) -> jax.Array:
        """Takes tokens [batch, context + 1], the same in all processes; returns what `update` measured."""
        placed = jax.make_array_from_callback(tokens.shape, self.tokens, lambda index: tokens[index])
        if self.compiled is None:
            self.compiled = self.program.lower(self.state, placed).compile()
        self.state, measured = self.compiled(self.state, placed)
        return measured

    def memory_gb(self) -> float:
        """What a device holds during a step, once one was taken."""
        found = self.compiled.memory_analysis()
        sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes
        return (sum(sizes) - found.alias_size_in_bytes) / 1e9


def train(config: Config, recipe: str, mesh: Mesh, seed: int, text: np.ndarray) -> tuple[Training, Curve]:
    training = Training(config, recipe, mesh, seed)
    training.start()
    source = batches(text, config, seed)
    measured: list[np.ndarray] = []
    begin = time.perf_counter()
    with Progress(config.steps, recipe, quiet=0.0, stream=stream()) as progress:
        waiting = training.step(next(source))
        jax.block_until_ready(waiting)
        first = time.perf_counter() - begin
        progress.step(f"first step {first:.1f} s")
        begin, rate = time.perf_counter(), math.nan
        for count in range(1, config.steps):
            now = training.step(next(source))  # the device works on this one while the last is read
            measured.append(np.asarray(waiting))
            waiting = now
            rate = count * config.batch * config.context / (time.perf_counter() - begin)
            progress.step(f"loss {measured[-1][0]:.3f}  {rate:,.0f} tokens/s")
        measured.append(np.asarray(waiting))
        if config.steps > 1:
            rate = (config.steps - 1) * config.batch * config.context / (time.perf_counter() - begin)
    loss, load, dropped = np.stack(measured).T.tolist()
    return training, Curve(loss, rate, first, training.memory_gb(), load, dropped)


def stream() -> Any:
    """Where progress goes: process 0 reports."""
    return sys.stderr if jax.process_index() == 0 else open(os.devnull, "w")


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def write(out: Path, config: Config, mesh: Mesh, seed: int, curves: dict[str, Curve]) -> None:
    """curves.json, and loss.png if matplotlib is there."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "device": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "seed": seed,
        "config": dataclasses.asdict(config),
        "curves": {recipe: dataclasses.asdict(curve) for recipe, curve in curves.items()},
    }
    (out / "curves.json").write_text(json.dumps(content, indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        say("No loss.png: matplotlib is missing; pip install matplotlib")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (loss, gap) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for recipe, curve in curves.items():
        loss.plot(curve.loss, label=f"{recipe}, {curve.tokens_per_second:,.0f} tokens/s", lw=1)
    loss.set(ylabel="loss, nats per byte", title=f"{content['device']}, {mesh.size} device(s)")
    loss.legend()
    for recipe, other, tolerance in compared(curves):
        ratio = np.array(curves[recipe].loss) / np.array(curves[other].loss)
        gap.plot(100 * (ratio - 1), label=f"{recipe} over {other}", lw=1)
        gap.axhspan(-100 * tolerance, 100 * tolerance, alpha=0.2)
    if compared(curves):
        gap.legend()
    gap.set(xlabel="step", ylabel="difference, %")
    for axis in (loss, gap):
        axis.grid(alpha=0.3)
    figure.savefig(out / "loss.png", dpi=120)
    plt.close(figure)


def save_weights(folder: Path, training: Training) -> None:
    """Parameters and router biases as an Orbax checkpoint; all processes take part."""
    import orbax.checkpoint as ocp

    params, rest, _ = training.state
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), nnx.merge_state(params, rest), force=True)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    mesh = start(args)
    given = {
        name: value
        for name in ("steps", "layers", "batch", "attention", "method", "capacity_factor")
        if (value := getattr(args, name)) is not None
    }
    config = dataclasses.replace(CONFIGS[args.config], **given)
    if config.batch % mesh.size:
        make_parser().error(
            f"argument --batch: {config.batch} sequences cannot be cut over {mesh.size} devices"
        )
    text = standard_library()
    shape = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    say(f"{len(text) / 1e6:.1f} MB of text; mesh {shape} of {jax.devices()[0].device_kind}")
    curves: dict[str, Curve] = {}
    for recipe in args.recipes:
        training, curve = train(config, recipe, mesh, args.seed, text)
        if not curves:
            say(f"{parameter_count(training.state[0]) / 1e6:.1f} million parameters")
        curves[recipe] = curve
        say(
            f"{recipe:4}  loss {curve.loss[0]:.4f} -> {curve.final():.4f}   "
            f"{curve.tokens_per_second:,.0f} tokens/s   {curve.memory_gb:.1f} GB   "
            f"first step {curve.first_step_seconds:.1f} s   "
            f"fullest expert {curve.largest_load[-1]:.2f} x mean"
        )
        if args.save:
            save_weights(args.out / f"weights-{recipe}", training)
        del training
    if jax.process_index() == 0:
        write(args.out, config, mesh, args.seed, curves)
    return verdict(curves)


def verdict(curves: dict[str, Curve]) -> int:
    if any(not np.isfinite(curve.loss).all() for curve in curves.values()):
        say("FAIL: a loss is not finite")
        return 1
    failed = 0
    for recipe, other, limit in compared(curves):
        gap = curves[recipe].final() / curves[other].final() - 1
        passed = gap <= limit
        failed += not passed
        word = "PASS" if passed else "FAIL"
        say(f"{word}: final loss in {recipe} is {gap:+.2%} of {other}'s; limit {limit:+.1%}")
    return int(failed > 0)


def compared(curves: dict[str, Curve]) -> list[tuple[str, str, float]]:
    """What can be compared of these runs."""
    return [pair for pair in COMPARED if {*pair[:2]} <= set(curves)]


if __name__ == "__main__":
    sys.exit(main())
