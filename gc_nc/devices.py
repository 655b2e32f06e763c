"""Devices and their memory, and where a run's arrays live: on one device or on a mesh of all.

Runs are data-parallel: the batch is divided among the devices and all else is replicated on them.
One program describes the computation for the whole batch and XLA divides it, so BatchNorm's
statistics, gradients and metrics are those of the whole batch, whatever the number of devices.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gc_nc.array_types import EmbedFn
from gc_nc.errors import InputError


def check_no_mesh() -> None:
    """Raises InputError inside `jax.set_mesh` of several devices, where JAX refuses single ones."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        raise InputError(
            f"jax.set_mesh is in force, of {mesh.size} devices, and runs place their arrays"
            " themselves; train, measure and transfer outside of it"
        )


class Placement:
    """The devices of a run; hashable, so that jax.jit takes it as a static argument."""

    def __init__(self, devices: Sequence[jax.Device]):
        """Takes the devices of all processes, in the same order in each process."""
        self._devices = tuple(devices)
        if len(devices) == 1:
            # A single device needs no mesh and pays nothing for one.
            self.replicated: Sharding = jax.sharding.SingleDeviceSharding(devices[0])
        else:
            self._mesh = Mesh(np.array(devices), ("batch",))
            self.replicated = NamedSharding(self._mesh, PartitionSpec())
            self._divided = NamedSharding(self._mesh, PartitionSpec("batch"))

    def __eq__(self, other: object) -> bool:
        """Whether both have the same devices."""
        return isinstance(other, Placement) and self._devices == other._devices

    def __hash__(self) -> int:
        """Hash of the devices."""
        return hash(self._devices)

    @property
    def num_devices(self) -> int:
        """Number of devices of all processes."""
        return len(self._devices)

    @property
    def jit_options(self) -> dict[str, Any]:
        """Options of jax.jit for a program whose results are replicated on every device."""
        return {} if self.num_devices == 1 else {"out_shardings": self.replicated}

    def check_batch_size(self, batch_size: int) -> None:
        """Checks that the devices can divide a batch.

        Raises:
          InputError: they cannot; the message names the nearest sizes that they can divide.
        """
        count = self.num_devices
        if batch_size % count:
            below, above = batch_size // count * count, -(-batch_size // count) * count
            sizes = f"{below} or {above}" if below else f"{above}"
            raise InputError(
                f"config.batch_size={batch_size} cannot be divided among {count} devices; set it to"
                f" {sizes}, or set --num_devices"
            )

    def replicate(self, tree: Any) -> Any:
        """Puts host arrays, equal in all processes, on every device."""
        if self.num_devices == 1:
            return jax.device_put(tree, self._devices[0])
        return jax.tree.map(self._replicate_array, tree)

    def _replicate_array(self, array: Any) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, self.replicated, lambda index: host[index])

    def divide_batch(self, tree: Any) -> Any:
        """Joins host arrays (B / processes, ...), each process's rows, into arrays (B, ...)."""
        if self.num_devices == 1:
            return jax.device_put(tree, self._devices[0])
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self._divided, rows), tree
        )

    def process_rows(self, batch_size: int) -> slice | None:
        """The rows of a batch that this process loads for `divide_batch`; None for all."""
        count = jax.process_count()
        if count == 1:
            return None
        size = batch_size // count
        return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def constrain_batch(self, tree: Any) -> Any:
        """Inside jit, divides arrays (B, ...) among the devices if their number divides B."""
        if self.num_devices == 1:
            return tree
        return jax.tree.map(
            lambda rows: (
                rows
                if rows.shape[0] % self.num_devices
                else jax.lax.with_sharding_constraint(rows, self._divided)
            ),
            tree,
        )

    def constrain_replicated(self, tree: Any) -> Any:
        """Inside jit, replicates the arrays on every device."""
        if self.num_devices == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.replicated)

    def divide_embedding(self, embed_fn: EmbedFn) -> EmbedFn:
        """`embed_fn` with its inputs divided among the devices."""
        if self.num_devices == 1:
            return embed_fn
        return lambda images: embed_fn(self.constrain_batch(images))


def is_main_process() -> bool:
    """Whether this process writes the logs."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest_of_all(value: int) -> int:
    """The largest of the processes' values; all processes must call it at the same point."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def free_device_memory() -> int:
    """Free bytes where arrays live by default: on the accelerator, or in main memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return free_main_memory()


def free_main_memory() -> int:
    """Free bytes of main memory."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
