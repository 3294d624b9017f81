"""Nodes, links and their speeds: what a prediction depends on besides the layouts."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rdt_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


_MAY_BE_ZERO = frozenset(
    {"fabric_gbits_per_s", "per_read_s", "publish_s", "prepare_s", "commit_s", "coordination_s"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """One kind of node, and the links in and between nodes. A TOML file sets any of these by name.

    The defaults describe eight H100 a node with one 400 Gb/s NIC each. What is measured and what is assumed
    is written in docs/simulator.md.

    Args:
        gpus_per_node: ranks of one node.
        nics_per_node: shared evenly by its ranks.
        nic_gbits_per_s: line rate of one NIC, each way.
        nic_efficiency: part of the line rate that large one-sided reads reach.
        fabric_gbits_per_s: all that may cross between nodes at once; 0 for a fabric that never limits.
        local_bytes_per_s: between two ranks of one node, each way (NVLink, or shared memory).
        copy_bytes_per_s: of a copy inside one device, bytes read plus bytes written.
        gpu_memory_bytes: of one device.
        per_read_s: what every read costs its reader on top of its bytes.
        publish_s: of a publish, besides copies.
        prepare_s: of a prepare, besides bytes: requests, version checks.
        commit_s: of a commit, besides copies.
        coordination_s: of one update, besides its phases: driver, HTTP, coordinator.
        is_colocated: whether engine ranks follow trainer ranks on the same node, as on one machine.
    """

    gpus_per_node: int = 8
    nics_per_node: int = 8
    nic_gbits_per_s: float = 400.0
    nic_efficiency: float = 0.92
    fabric_gbits_per_s: float = 0.0
    local_bytes_per_s: float = 300e9
    copy_bytes_per_s: float = 2e12
    gpu_memory_bytes: float = 80e9
    per_read_s: float = 2e-6
    publish_s: float = 0.001
    prepare_s: float = 0.005
    commit_s: float = 0.001
    coordination_s: float = 0.025
    is_colocated: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            may_be_zero = field.name in _MAY_BE_ZERO
            if value < 0 or (value == 0 and not may_be_zero):
                raise ConfigError(f"topology has {field.name}={value}, expected a number above 0.")
        if not self.nic_efficiency <= 1:
            raise ConfigError(f"topology has nic_efficiency={self.nic_efficiency}, expected at most 1.")

    @classmethod
    def of_one_machine(cls, *, copy_bytes_per_s: float, local_bytes_per_s: float) -> Topology:
        """Trainer and engine as processes of one machine without GPUs, with the fixed costs measured there.

        Args:
            copy_bytes_per_s: of a copy inside one process, bytes read plus bytes written.
            local_bytes_per_s: at which a process reads another's memory.
        """
        return cls(
            is_colocated=True,
            copy_bytes_per_s=copy_bytes_per_s,
            local_bytes_per_s=local_bytes_per_s,
        )

    @property
    def nic_bytes_per_s(self) -> float:
        """What one NIC carries each way."""
        return self.nic_gbits_per_s / 8 * 1e9 * self.nic_efficiency

    def first_engine_place(self, num_trainers: int) -> int:
        """Where engine ranks begin when ranks are counted over nodes, trainers first."""
        if self.is_colocated:
            return num_trainers
        return -(-num_trainers // self.gpus_per_node) * self.gpus_per_node

    def engine_node(self, rank: int, num_trainers: int) -> int:
        """The node of an engine rank, counted over all engines."""
        return (self.first_engine_place(num_trainers) + rank) // self.gpus_per_node

    def nic_of(self, place: int) -> int:
        """The NIC that the rank at a place of its node uses."""
        return place * self.nics_per_node // self.gpus_per_node


def load_topology(path: Path) -> Topology:
    """Read a TOML file of fields.

    Raises:
        ConfigError: it cannot be read, or names a field that there is not, or a value of another type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Give a topology file in TOML.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}. Write one `name = value` a line.") from error
    known = {field.name: field.default for field in fields(Topology)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path} has {name!r}, which no topology has. Known are {', '.join(known)}.")
        expected = (int, float) if isinstance(known[name], float) else type(known[name])
        if not isinstance(value, expected) or isinstance(value, bool) != isinstance(known[name], bool):
            raise ConfigError(f"{path} has {name}={value!r}, expected a value like {known[name]!r}.")
    return Topology(**values)
