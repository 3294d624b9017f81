from __future__ import annotations

import pytest

from rdt_core import settings
from rdt_core.choice import AUTO, RULES, Endpoint, Rule, choose_transport
from rdt_core.errors import ConfigError, TransportUnavailableError

EVERYTHING = ("cuda_ipc", "memory", "nixl", "yr")


def trainer(device: str = "cpu", offers: tuple[str, ...] = EVERYTHING, node: str = "a") -> Endpoint:
    return Endpoint("trainer rank 3", node, device, offers)


def engine(device: str = "cpu", offers: tuple[str, ...] = EVERYTHING, node: str = "a") -> Endpoint:
    return Endpoint("engine rank 0", node, device, offers)


@pytest.mark.parametrize(
    ("trainer_device", "engine_device", "engine_node", "chosen"),
    [
        ("cuda:0", "cuda:0", "a", "cuda_ipc"),
        ("cuda:0", "cuda:5", "a", "cuda_ipc"),
        ("cuda:0", "cuda:0", "b", "nixl"),
        ("cpu", "cuda:0", "a", "nixl"),
        ("cuda:0", "cpu", "a", "nixl"),
        ("cpu", "cpu", "a", "nixl"),
        ("cpu", "cpu", "b", "nixl"),
        ("npu:0", "npu:1", "a", "yr"),
        ("npu:0", "npu:0", "b", "yr"),
    ],
)
def test_the_table_picks_by_node_and_device(
    trainer_device: str, engine_device: str, engine_node: str, chosen: str
) -> None:
    choice = choose_transport(trainer(trainer_device), engine(engine_device, node=engine_node))
    assert choice.transport == chosen
    assert choice.reason
    assert not choice.is_second_best


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.transport)
def test_every_row_of_the_table_can_be_reached(rule: Rule) -> None:
    reached = {choose_transport(trainer(one), engine(one)).transport for one in ("cpu", "cuda:0", "npu:0")}
    assert rule.transport in reached


def test_what_one_side_lacks_is_passed_over_and_both_are_said() -> None:
    choice = choose_transport(trainer("cuda:0", ("nixl", "memory")), engine("cuda:0"))
    assert (choice.transport, choice.is_second_best) == ("nixl", True)
    assert "cuda_ipc is not offered by trainer rank 3 (cuda:0 on a" in choice.reason


def test_nothing_that_both_offer_is_an_error_that_names_what_is_lacking() -> None:
    with pytest.raises(TransportUnavailableError, match="nixl is not offered by engine rank 0"):
        choose_transport(trainer(), engine(offers=("memory",)))


def test_memory_that_no_row_connects_is_an_error_that_names_both_sides() -> None:
    with pytest.raises(TransportUnavailableError, match=r"trainer rank 3 \(npu:0 .* engine rank 0 \(cuda:0"):
        choose_transport(trainer("npu:0"), engine("cuda:0"))


def test_memory_is_never_chosen_and_can_be_forced() -> None:
    with pytest.raises(TransportUnavailableError):
        choose_transport(trainer(offers=("memory",)), engine(offers=("memory",)))
    assert choose_transport(trainer(), engine(), "memory").transport == "memory"


def test_a_forced_transport_goes_before_the_table() -> None:
    choice = choose_transport(trainer("cuda:0"), engine("cuda:0"), "nixl")
    assert (choice.transport, choice.reason, choice.is_second_best) == ("nixl", "forced", False)


@pytest.mark.parametrize("forced", ["yr", "pigeon"])
def test_a_forced_transport_that_a_side_lacks_is_refused_with_what_it_offers(forced: str) -> None:
    with pytest.raises(TransportUnavailableError, match=rf"'{forced}'.*engine rank 0 .*offers memory, nixl"):
        choose_transport(trainer(), engine(offers=("memory", "nixl")), forced)


def test_the_environment_forces_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDT_TRANSPORT", raising=False)
    assert settings.read_transport() == AUTO
    monkeypatch.setenv("RDT_TRANSPORT", " nixl ")
    assert settings.read_transport() == "nixl"


def test_a_data_worker_is_read_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASYSTEM_HOST", "10.0.0.1")
    monkeypatch.delenv("DATASYSTEM_PORT", raising=False)
    assert settings.read_data_worker() is None
    monkeypatch.setenv("DATASYSTEM_PORT", "31501")
    assert settings.read_data_worker() == ("10.0.0.1", 31_501)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "1.5"])
def test_a_port_that_is_no_port_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("DATASYSTEM_HOST", "10.0.0.1")
    monkeypatch.setenv("DATASYSTEM_PORT", port)
    with pytest.raises(ConfigError, match="DATASYSTEM_PORT"):
        settings.read_data_worker()
