"""What a sync is compared with: the limits of the machine, and other ways to move the same bytes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from cases import CASES, num_bytes
from trainer import TIMEOUT_S, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE = Path(__file__).parent
Sample = dict[str, float]


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """The fastest of torch's own ways on either device."""
    if targets[0].is_cuda:
        torch._foreach_copy_(list(targets), list(sources))
        torch.cuda.synchronize(targets[0].device)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def make_parameters(case: str, device: str) -> list[torch.Tensor]:
    """An engine's memory for a case."""
    return [
        torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in CASES[case].shapes().values()
    ]


def timed(act: Callable[[], object], runs: int) -> list[Sample]:
    """Seconds of every run."""
    samples = []
    for _ in range(runs):
        started = time.perf_counter()
        act()
        samples.append({"end_to_end": time.perf_counter() - started})
    return samples


def start(cls: type, *arguments: Any) -> Any:
    """An actor that takes no slot of the cluster."""
    return ray.remote(cls).options(num_cpus=0).remote(*arguments)


def measure_copy(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """The limit: the same bytes copied inside one process, on the engine's device. On CPU, by tensors."""
    device = devices[1]
    if device == "cpu":
        sources = [torch.randn(shape).to(torch.bfloat16) for shape in CASES[case].shapes().values()]
        targets = [torch.zeros_like(source) for source in sources]
        return timed(lambda: copy_all(targets, sources), runs)
    source = torch.randn(num_bytes(case) // 2, device=device, dtype=torch.bfloat16)
    target = torch.zeros_like(source)
    return _timed_on_device(source, target, runs)


def measure_peer_copy(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """The limit between two GPUs: the same bytes copied by one process that sees both."""
    source = torch.randn(num_bytes(case) // 2, device=devices[0], dtype=torch.bfloat16)
    target = torch.zeros_like(source, device=devices[1])
    return _timed_on_device(source, target, runs)


def _timed_on_device(source: torch.Tensor, target: torch.Tensor, runs: int) -> list[Sample]:
    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(source.device)
        torch.cuda.synchronize(target.device)

    return timed(copy, runs)


class Source(Trainer):
    """A trainer that offers its tensors in the ways of others."""

    def share(self) -> bytes:
        """Torch's own CUDA IPC handles of every tensor."""
        from torch.multiprocessing.reductions import reduce_tensor  # noqa: PLC0415

        self.synchronize()
        reduce: Callable[[torch.Tensor], Any] = reduce_tensor
        return pickle.dumps([reduce(data) for data in self.tensors.values()])

    def put_window(self) -> list[Any]:
        """One ref to views of all tensors, by stock NIXL."""
        from ray.experimental import register_nixl_memory  # noqa: PLC0415

        for data in self.tensors.values():
            register_nixl_memory(data)
        return [ray.put(list(self.tensors.values()), _tensor_transport="nixl")]

    def put_in_plasma(self) -> tuple[float, list[Any]]:
        """Put every tensor as a numpy array; returns when it began, by the system clock."""
        started = time.time()
        return started, [ray.put(data.view(torch.int16).numpy()) for data in self.tensors.values()]


class Reader:
    """An engine's process that reads in the ways of others."""

    def __init__(self, case: str, device: str) -> None:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        self._parameters = make_parameters(case, device)
        self._mapped: list[torch.Tensor] = []
        self._ref: Any = None

    def map(self, handles: bytes) -> None:
        """Map torch's CUDA IPC handles."""
        rebuilt = pickle.loads(handles)  # noqa: S301  from our own process
        self._mapped = [rebuild(*arguments) for rebuild, arguments in rebuilt]

    def copy_mapped(self, runs: int) -> list[float]:
        """Seconds of every foreach copy from the mapped tensors."""
        return [s["end_to_end"] for s in timed(lambda: copy_all(self._parameters, self._mapped), runs)]

    def set_targets(self, refs: list[Any]) -> None:
        """Aim a ref at the parameters."""
        from ray.experimental import register_nixl_memory, set_target_for_ref  # noqa: PLC0415

        (self._ref,) = refs
        for parameter in self._parameters:
            register_nixl_memory(parameter)
        set_target_for_ref(self._ref, self._parameters)

    def get(self, runs: int) -> list[float]:
        """Seconds of every ``ray.get`` of the ref."""
        return [s["end_to_end"] for s in timed(lambda: ray.get(self._ref, timeout=TIMEOUT_S), runs)]

    def unpack(self, refs: list[Any]) -> None:
        """Get one merged buffer and copy its parts into the parameters."""
        ((merged,),) = ray.get(refs, timeout=TIMEOUT_S)
        sizes = [parameter.numel() for parameter in self._parameters]
        parts = [
            part.view_as(parameter)
            for part, parameter in zip(torch.split(merged, sizes), self._parameters, strict=True)
        ]
        copy_all(self._parameters, parts)

    def read_plasma(self, refs: list[Any]) -> float:
        """Get numpy arrays and copy them; returns when it ended, by the system clock."""
        for data, array in zip(self._parameters, ray.get(refs, timeout=TIMEOUT_S), strict=True):
            data.view(torch.int16).numpy()[...] = array
        return time.time()


class Sidecar:
    """The seed's extra actor beside the trainer: maps its tensors, merges them, offers the merged buffer."""

    def __init__(self, device: str, handles: bytes) -> None:
        torch.cuda.set_device(device)
        rebuilt = pickle.loads(handles)  # noqa: S301  from our own process
        self._mapped = [rebuild(*arguments) for rebuild, arguments in rebuilt]
        sizes = [tensor.numel() for tensor in self._mapped]
        self._merged = torch.empty(sum(sizes), dtype=torch.bfloat16, device=device)
        self._parts = [
            part.view_as(tensor)
            for part, tensor in zip(torch.split(self._merged, sizes), self._mapped, strict=True)
        ]

    def offer(self) -> list[Any]:
        """A ref to the merged buffer, with what the trainer holds now."""
        copy_all(self._parts, self._mapped)
        return [ray.put([self._merged], _tensor_transport="nixl")]


def measure_ipc_foreach(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """The limit across processes: torch's CUDA IPC and one foreach copy."""
    source, reader = start(Source, case, devices[0]), start(Reader, case, devices[1])
    ray.get(reader.map.remote(ray.get(source.share.remote(), timeout=TIMEOUT_S)), timeout=TIMEOUT_S)
    seconds = ray.get(reader.copy_mapped.remote(runs), timeout=TIMEOUT_S)
    _end(reader, source)
    return [{"end_to_end": s} for s in seconds]


def measure_seed_design(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """The seed's way, its one-time work done beforehand: sidecar, merged buffer, stock NIXL, unpacking."""
    source, reader = start(Source, case, devices[0]), start(Reader, case, devices[1])
    handles = ray.get(source.share.remote(), timeout=TIMEOUT_S)
    sidecar = start(Sidecar, devices[0], handles)

    def update() -> None:
        refs = ray.get(sidecar.offer.remote(), timeout=TIMEOUT_S)
        ray.get(reader.unpack.remote(refs), timeout=TIMEOUT_S)

    samples = timed(update, runs)
    _end(reader, sidecar, source)
    return samples


def measure_ray_nixl(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """Stock Ray NIXL: one ref of views, put once, with the parameters as targets."""
    source, reader = start(Source, case, devices[0]), start(Reader, case, devices[1])
    ray.get(
        reader.set_targets.remote(ray.get(source.put_window.remote(), timeout=TIMEOUT_S)), timeout=TIMEOUT_S
    )
    seconds = ray.get(reader.get.remote(runs), timeout=TIMEOUT_S)
    _end(reader, source)
    return [{"end_to_end": s} for s in seconds]


def measure_plasma(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """numpy arrays through Ray's object store, put on one side, got and copied on the other."""
    source, reader = start(Source, case, devices[0]), start(Reader, case, devices[1])
    samples = []
    for _ in range(runs):
        started, refs = ray.get(source.put_in_plasma.remote(), timeout=TIMEOUT_S)
        ended = ray.get(reader.read_plasma.remote(refs), timeout=TIMEOUT_S)
        samples.append({"end_to_end": ended - started})
    _end(reader, source)
    return samples


def measure_gloo(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """``torch.distributed.broadcast`` of every tensor by gloo, which goes through the host."""
    return _measure_collective(case, runs, devices, "gloo", "broadcast")


def measure_nccl_broadcast(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """NCCL broadcast of every tensor."""
    return _measure_collective(case, runs, devices, "nccl", "broadcast")


def measure_nccl_send(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """NCCL send and receive of every tensor, in one batch."""
    return _measure_collective(case, runs, devices, "nccl", "send")


def _measure_collective(case: str, runs: int, devices: Sequence[str], backend: str, how: str) -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "collective.py"), "--case", case, "--runs", str(runs)]
        command += ["--folder", folder, "--backend", backend, "--how", how]
        reader = subprocess.Popen(
            [*command, "--rank", "1", "--device", devices[1]], stdout=subprocess.DEVNULL
        )
        try:
            done = subprocess.run(
                [*command, "--rank", "0", "--device", devices[0]],
                stdout=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT_S,
                check=True,
            )
        finally:
            reader.kill()
            reader.wait(TIMEOUT_S)
    return [{"end_to_end": seconds} for seconds in json.loads(done.stdout.splitlines()[-1])]


def measure_safetensors(case: str, runs: int, devices: Sequence[str]) -> list[Sample]:
    """Save to a file, load it, copy into parameters."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    sources = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in CASES[case].shapes().items()}
    targets = dict(zip(sources, make_parameters(case, devices[1]), strict=True))
    with tempfile.TemporaryDirectory(dir=HERE) as folder:

        def pass_on() -> None:
            save_file(sources, f"{folder}/model.safetensors")
            for name, data in load_file(f"{folder}/model.safetensors").items():
                targets[name].copy_(data)

        return timed(pass_on, runs)


def _end(*actors: Any) -> None:
    """Kill the actors, the reader before what it reads."""
    for actor in actors:
        ray.kill(actor)
