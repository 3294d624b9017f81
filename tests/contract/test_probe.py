"""The probe at connect: what an honest transport passes, and how each kind of lie is named."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
import torch

from rdt_core.errors import TransportLiesError
from rdt_core.probe import ROUNDS, ProbeSource, ProbeTarget, Scratch, ScratchPool
from rdt_core.transports.memory import MemoryExport, MemoryTransport
from tests.contract import flawed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.transports.base import Transport
    from tests.contract.flawed import Flaw


def probe(transport: Transport) -> None:
    """Both rounds between two sides in this process."""
    device = torch.device("cpu")
    scratch, landed = Scratch(transport, device), Scratch(transport, device)
    source = ProbeSource(transport, scratch)
    target: ProbeTarget | None = None
    try:
        for version in ROUNDS:
            secret = secrets.token_hex(8)
            ticket = source.write(secret, version)
            target = target or ProbeTarget(transport, landed, ticket, trainer_rank=5, timeout_s=30.0)
            target.check(secret, version)
    finally:
        source.close()
        scratch.close()
        if target is not None:
            target.close()
        landed.close()


def test_an_honest_transport_passes() -> None:
    probe(MemoryTransport())


@pytest.mark.parametrize(
    ("flaw", "named"),
    [
        (flawed.leave_untouched, "left its targets as they were"),
        (flawed.bring_stale, "brought the bytes of an earlier version"),
        (flawed.flip_one_byte, "brought 1 wrong bytes"),
        (flawed.skip_the_last_view, "wrong bytes of"),
        (flawed.write_beside, "wrote 1 bytes beside its targets"),
    ],
)
def test_a_transport_that_lies_is_refused_by_what_it_did(flaw: Flaw, named: str) -> None:
    with pytest.raises(TransportLiesError, match=named) as caught:
        probe(flawed.FlawedTransport(flaw))
    assert (caught.value.transport, caught.value.trainer_rank) == ("memory", 5)


def test_a_probe_leaves_no_export_behind() -> None:
    made: list[MemoryExport] = []

    class Counting(MemoryTransport):
        def export(self, views: Sequence[torch.Tensor]) -> MemoryExport:
            export = MemoryExport(views)
            made.append(export)
            return export

    probe(Counting())
    assert [export.views for export in made] == [None]


def test_a_buffer_is_used_again_unless_its_probe_failed() -> None:
    pool, wanted = ScratchPool(), (MemoryTransport(), torch.device("cpu"))
    with pool.lend(*wanted) as first:
        assert pool.take(*wanted) is not first

    def fail() -> None:
        with pool.lend(*wanted) as again:
            assert again is first
            raise TransportLiesError("memory", 0, "brought 1 wrong bytes")

    with pytest.raises(TransportLiesError):
        fail()
    with pool.lend(*wanted) as fresh:
        assert fresh is not first
    pool.close()
