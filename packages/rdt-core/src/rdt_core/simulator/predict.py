"""Seconds by phase from traffic and link speeds, and the link that decides them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.errors import ConfigError
from rdt_core.plan_summary import imbalance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.simulator.topology import Topology
    from rdt_core.simulator.traffic import Traffic

MODES = ("auto", "staged", "inplace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one update takes.

    Args:
        mode: ``staged`` (read beside the parameters, then copied) or ``inplace`` (read into them).
        mode_reason: why that one.
        publish_s: trainer ranks lay out what cannot be read as it lies, and tell the coordinator.
        read_s: the slowest rank's reads.
        fan_out_s: copies inside engine nodes.
        commit_s: local copies into the parameters.
        coordination_s: everything between the phases.
        stall_s: how long generation stands.
        total_s: of the update, publish included.
        bottleneck: key of ``links`` that the reads wait for.
        links: seconds that each kind of link needs for its busiest member, if it were alone.
        limit_s: reads alone at full line rate, perfectly spread over the engines' NICs.
        staged_nbytes: parameters and landing memory of the fullest engine rank.
        trainer_imbalance: the largest egress of a trainer rank over the mean, less one.
    """

    mode: str
    mode_reason: str
    publish_s: float
    read_s: float
    fan_out_s: float
    commit_s: float
    coordination_s: float
    stall_s: float
    total_s: float
    bottleneck: str
    links: Mapping[str, float]
    limit_s: float
    staged_nbytes: int
    trainer_imbalance: float


def predict(traffic: Traffic, topology: Topology, *, mode: str = "auto") -> Prediction:
    """Predict one update.

    Raises:
        ConfigError: ``mode`` is none of ``MODES``.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is none of {', '.join(MODES)}.")
    staged_nbytes = max((traffic.needed[r] + traffic.landed[r] for r in traffic.needed), default=0)
    mode, reason = _choose_mode(mode, staged_nbytes, topology)
    links = _link_seconds(traffic, topology)
    overhead_s = max(traffic.num_reads.values(), default=0) * topology.per_read_s
    read_s = topology.prepare_s + max(links.values(), default=0.0) + overhead_s
    fan_out_s = _busiest(traffic.fan_in, traffic.fan_out) / topology.local_bytes_per_s
    commit_s = topology.commit_s
    if mode == "staged":
        commit_s += staged_nbytes / topology.copy_bytes_per_s
    publish_s = topology.publish_s + max(traffic.arena.values(), default=0) / topology.copy_bytes_per_s
    stall_s = commit_s if mode == "staged" else read_s + fan_out_s + commit_s
    return Prediction(
        mode=mode,
        mode_reason=reason,
        publish_s=publish_s,
        read_s=read_s,
        fan_out_s=fan_out_s,
        commit_s=commit_s,
        coordination_s=topology.coordination_s,
        stall_s=stall_s,
        total_s=publish_s + read_s + fan_out_s + commit_s + topology.coordination_s,
        bottleneck=max(links, key=lambda name: links[name]),
        links=links,
        limit_s=_limit_s(traffic, topology),
        staged_nbytes=staged_nbytes,
        trainer_imbalance=imbalance(traffic.egress()),
    )


def _choose_mode(mode: str, staged_nbytes: int, topology: Topology) -> tuple[str, str]:
    room = topology.gpu_memory_bytes
    sizes = f"parameters and landing memory are {staged_nbytes / 1e9:.1f} GB of {room / 1e9:.0f} GB"
    if mode != "auto":
        return mode, f"as asked; {sizes}"
    return ("staged", sizes) if staged_nbytes <= room else ("inplace", f"{sizes}: no room to stage")


def _link_seconds(traffic: Traffic, topology: Topology) -> dict[str, float]:
    per_nic = topology.nic_bytes_per_s
    first = topology.first_engine_place(traffic.num_trainers)
    links = {
        "engine NIC": _busiest(_by_nic(traffic.nic_in, topology, first)) / per_nic,
        "trainer NIC": _busiest(_by_nic(traffic.nic_out, topology, 0)) / per_nic,
        "inside a node": _busiest(traffic.local_in) / topology.local_bytes_per_s,
    }
    if topology.fabric_gbits_per_s:
        crossing = sum(traffic.nic_in.values())
        links["fabric"] = crossing / (topology.fabric_gbits_per_s / 8 * 1e9)
    return links


def _by_nic(loads: Counter[int], topology: Topology, offset: int) -> Counter[tuple[int, int]]:
    total: Counter[tuple[int, int]] = Counter()
    for rank, nbytes in loads.items():
        node, place = divmod(rank + offset, topology.gpus_per_node)
        total[node, topology.nic_of(place)] += nbytes
    return total


def _busiest(*loads: Counter[int] | Counter[tuple[int, int]]) -> int:
    return max((max(load.values(), default=0) for load in loads), default=0)


def _limit_s(traffic: Traffic, topology: Topology) -> float:
    """What shared memory cannot avoid: each node's distinct bytes over all of its NICs at line rate."""
    per_node = topology.nics_per_node * topology.nic_gbits_per_s / 8 * 1e9
    if not traffic.nic_in:
        return 0.0
    return max(traffic.node_distinct.values(), default=0) / per_node
