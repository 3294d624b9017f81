from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from rdt_core.errors import ConfigError
from rdt_core.gateway.errors import (
    GatewayError,
    PairBusyError,
    PairExistsError,
    StoreFullError,
    TrainerWorkerError,
    UnknownPairError,
    UnsupportedRequestError,
)
from rdt_core.gateway.settings import DEFAULT_KEYS, GatewaySettings, is_loopback
from rdt_core.gateway.store import MAX_KEYS_PER_PAIR, MetaStore

ERRORS = [
    GatewayError("it failed"),
    PairBusyError("p", 3, 4),
    PairExistsError("p"),
    StoreFullError("256 pairs"),
    TrainerWorkerError("http://t:1", "it does not answer"),
    UnknownPairError("p"),
    UnsupportedRequestError("mode", "'awex'", "Use AReaL's."),
]


@pytest.mark.parametrize("key", ["", *sorted(DEFAULT_KEYS)])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example"])  # noqa: S104  refused
def test_a_gateway_that_others_can_reach_does_not_start_without_a_secret(host: str, key: str) -> None:
    with pytest.raises(ConfigError, match="RDT_GATEWAY_API_KEY"):
        GatewaySettings(host=host, api_key=key)


def test_a_secret_allows_any_address_and_a_loopback_address_needs_none() -> None:
    assert GatewaySettings(host="0.0.0.0", api_key="X7").api_key == "X7"  # noqa: S104  with a key
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        assert GatewaySettings(host=host).host == host


def test_settings_do_not_show_their_keys() -> None:
    shown = repr(GatewaySettings(api_key="k-one", engine_api_key="k-two", trainer_api_key="k-three"))
    assert "k-" not in shown


@pytest.mark.parametrize("field", ["init_timeout_s", "update_timeout_s", "max_body_bytes", "max_store_bytes"])
def test_a_bound_that_is_not_positive_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(GatewaySettings(), **{field: 0})  # type: ignore[arg-type]  # the field is a variable


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_read_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="read_share"):
        replace(GatewaySettings(), read_share=share)


def test_a_fan_out_that_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="fan_out"):
        replace(GatewaySettings(), fan_out="sometimes")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_gateway_error_survives_pickle(error: GatewayError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_every_gateway_error_is_examined_here() -> None:
    assert {type(error) for error in ERRORS} == {GatewayError, *GatewayError.__subclasses__()}


def test_the_store_counts_bytes_and_refuses_what_would_pass_its_bound() -> None:
    store = MetaStore(max_bytes=20)
    store.put("p", "a", "x" * 8)
    store.put("p", "b", "y" * 8)
    with pytest.raises(StoreFullError, match="bytes"):
        store.put("p", "a", "x" * 9)
    with pytest.raises(StoreFullError, match="bytes"):
        store.add("p", "s", "z")
    assert store.get("p", "a") == "x" * 8
    assert store.delete("p", "b")
    store.put("q", "a", "x" * 8)
    store.clear("p")
    store.clear("q")
    store.put("p", "a", "x" * 18)


def test_the_store_refuses_more_keys_than_its_bound() -> None:
    store = MetaStore(max_bytes=10**9)
    for number in range(MAX_KEYS_PER_PAIR):
        store.put("p", str(number), None)
    for put in (store.put, store.add):
        with pytest.raises(StoreFullError, match="keys"):
            put("p", "one more", "x")
    store.put("p", "0", "again")
    store.put("another pair", "one more", None)
