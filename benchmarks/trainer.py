"""A trainer rank for benchmarks: a Ray actor that holds its part of a case in one device's memory."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import psutil
import ray
import torch
from cases import CASES, dim_of, held_by_trainer

from rdt_core import LocalShard, LocalShards, TensorSpec, WeightPublisher

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 300.0
STEP_S = 0.02
"""Of a step, beside its own work: long enough for a driver to ask engines meanwhile."""


class Trainer:
    """One trainer rank.

    Args:
        case: whose tensors it holds.
        device: where.
        rank: of ``size``.
        size: how many there are.
        dtype: of its memory.
        layout: how ranks share the tensors, see :func:`cases.held_by_trainer`.
    """

    def __init__(
        self,
        case: str,
        device: str,
        rank: int = 0,
        size: int = 1,
        dtype: str = "bfloat16",
        layout: str = "tp",
    ) -> None:
        self._rank, self._size, self._dtype, self._device = rank, size, dtype, torch.device(device)
        self._layout = layout
        self._shapes = CASES[case].shapes()
        held = {
            name: held_by_trainer(name, shape, rank, size, layout) for name, shape in self._shapes.items()
        }
        self._regions = {name: region for name, region in held.items() if region is not None}
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self.tensors = {
            name: self._make(name, index, region.shape)
            for index, (name, region) in enumerate(self._regions.items())
        }
        self._publisher: WeightPublisher | None = None

    def _make(self, name: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        # What every rank holds is alike in all, what is cut differs.
        is_alike = self._layout == "ep" or dim_of(name) is None
        torch.manual_seed(index if is_alike else index + 100_003 * (1 + self._rank))
        return torch.randn(shape, device=self._device, dtype=getattr(torch, self._dtype))

    def attach(self, group: str) -> None:
        """Offer every tensor."""
        shards = tuple(
            LocalShard(
                spec=TensorSpec(name, self._shapes[name], self._dtype),
                region=self._regions[name],
                data=data,
                owner=name,
            )
            for name, data in self.tensors.items()
        )

        def locate() -> tuple[int, ...]:
            return tuple(map(torch.Tensor.data_ptr, self.tensors.values()))

        local = LocalShards(rank=self._rank, world_size=self._size, shards=shards, locate=locate)
        self._publisher = WeightPublisher.attach(group, local)
        # What this process made so far stays: the collector need not walk it during a publish.
        gc.collect()
        gc.freeze()

    def step(self) -> None:
        """Change every tensor, and wait for the device."""
        torch._foreach_mul_(list(self.tensors.values()), 0.99)
        self.synchronize()

    def publish(self, version: int) -> tuple[float, float]:
        """Publish; returns when that began and ended, on the clock that processes of one host share."""
        if self._publisher is None:
            raise RuntimeError("attach first")
        started = time.perf_counter()
        self._publisher.publish(version)
        return started, time.perf_counter()

    def step_and_publish(self, version: int) -> tuple[float, float]:
        """A step, and at its end its weights; returns as :meth:`publish`."""
        time.sleep(STEP_S)  # stands for the step's own work; the clock starts after it
        self.step()
        return self.publish(version)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def memory_bytes(self) -> int:
        """What this process holds on its device: resident memory on CPU, torch's segments on CUDA."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._device))
        return int(psutil.Process().memory_info().rss)

    def close(self) -> None:
        """Leave the group."""
        if self._publisher is not None:
            self._publisher.close()


class TrainerGroup:
    """All trainer ranks of a case, seen from the driver."""

    def __init__(self, case: str, devices: list[str], dtype: str = "bfloat16", layout: str = "tp") -> None:
        size = len(devices)
        make = ray.remote(Trainer).options(num_cpus=0)
        self._actors: list[Any] = [
            make.remote(case, device, rank, size, dtype, layout) for rank, device in enumerate(devices)
        ]

    def attach(self, group: str) -> None:
        """Every rank offers its tensors."""
        ray.get([actor.attach.remote(group) for actor in self._actors], timeout=TIMEOUT_S)

    def step(self) -> None:
        """Every rank changes its tensors; blocks until all have."""
        ray.get([actor.step.remote() for actor in self._actors], timeout=TIMEOUT_S)

    def start_publish(self, version: int) -> Callable[[], list[tuple[float, float]]]:
        """Have every rank publish; returns at once with what waits, and gives each rank's begin and end."""
        return _waiter([actor.publish.remote(version) for actor in self._actors])

    def start_step(self, version: int) -> Callable[[], list[tuple[float, float]]]:
        """Have every rank do a step and publish; as :meth:`start_publish`."""
        return _waiter([actor.step_and_publish.remote(version) for actor in self._actors])

    def memory_bytes(self) -> int:
        """Of all ranks together."""
        return int(sum(ray.get([actor.memory_bytes.remote() for actor in self._actors], timeout=TIMEOUT_S)))

    def close(self) -> None:
        """Leave, and end the processes."""
        ray.get([actor.close.remote() for actor in self._actors], timeout=TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)


def _waiter(published: list[Any]) -> Callable[[], list[tuple[float, float]]]:
    def wait() -> list[tuple[float, float]]:
        return list(ray.get(published, timeout=TIMEOUT_S))

    return wait
