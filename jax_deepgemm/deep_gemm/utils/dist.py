"""Several processes: start, gather, print."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import ArrayLike

__all__ = ["dist_print", "init_dist", "uneven_all_gather"]


def init_dist(local_rank: int, num_local_ranks: int) -> tuple[int, int, Mesh]:
    """Joins this process to the others, which have one GPU each, by `jax.distributed.initialize`.

    The environment says where: MASTER_ADDR and MASTER_PORT (127.0.0.1 and 8361), WORLD_SIZE, the number of
    nodes (1), and RANK, this node's (0).

    Args:
      local_rank: of this process in its node, and the GPU that it takes.
      num_local_ranks: processes of a node.

    Returns:
      (rank, number of ranks, mesh of all devices with the axis "ranks"), where torch has a group.

    Raises:
      RuntimeError: JAX has computed something before, or the others do not answer.

    >>> init_dist(0, 1)  # doctest: +SKIP
    (0, 1, Mesh('ranks': 1))
    """
    address = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '8361')}"
    count = int(os.environ.get("WORLD_SIZE", "1")) * num_local_ranks
    rank = int(os.environ.get("RANK", "0")) * num_local_ranks + local_rank
    jax.distributed.initialize(address, count, rank, local_device_ids=[local_rank])
    return rank, count, Mesh(np.asarray(jax.devices()), ("ranks",))


def uneven_all_gather(x: ArrayLike, dim: int = 0, group: Any = None) -> jax.Array:
    """The arrays of all processes, one behind the other along `dim`, in which they may differ.

    Args:
      x: [..], of this process; the other dimensions are equal everywhere.
      dim: the dimension.
      group: as `init_dist` returns it; all processes take part.

    Returns:
      [..] on every process.

    Raises:
      ValueError: processes that have no dimension `dim`.

    Not inside `jax.jit`: sizes are exchanged first.

    >>> uneven_all_gather(jnp.arange(3)).tolist()
    [0, 1, 2]
    """
    own = np.moveaxis(np.asarray(x), dim, 0)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(own.shape[0]))).reshape(-1)
    padded = np.zeros((int(sizes.max()), *own.shape[1:]), own.dtype)
    padded[: own.shape[0]] = own
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), *padded.shape)
    whole = np.concatenate([part[:size] for part, size in zip(gathered, sizes)])
    return jnp.asarray(np.moveaxis(whole, 0, dim))


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Prints on every process, or on one, and waits for the others.

    Args:
      s: the line.
      once_in_node: only the first process prints: JAX does not know which of them share a node.

    Raises nothing.

    >>> dist_print("ready", once_in_node=True)
    ready
    """
    if not once_in_node or jax.process_index() == 0:
        print(s, flush=True)
    multihost_utils.sync_global_devices("dist_print")
