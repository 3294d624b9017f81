from __future__ import annotations

import itertools
import json
import pickle
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core import errors
from rdt_core.error_wire import from_wire, to_wire
from rdt_core.errors import RdtError

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES: dict[str, tuple[object, ...]] = {
    "RdtError": ("something failed",),
    "ConfigError": ("a setting is wrong",),
    "UnknownDtypeError": ("float3",),
    "InvalidVersionError": ("seven",),
    "UnsupportedEngineError": ("vllm", "0.1.0", "a weight-transfer factory"),
    "ManifestError": ("a shard is malformed",),
    "WireFormatError": ("manifest", "it ends early"),
    "UnsupportedLayoutError": ("model.norm.weight", 3, "it is quantized", "Export before quantizing."),
    "PlanError": ("two manifests claim rank 1",),
    "CoverageError": ("model.norm.weight", "[0:4]", 2, (1, 3)),
    "OverlapError": ("model.norm.weight", "[0:4]", 0, "[2:6]", 1),
    "DtypeError": ("model.norm.weight", "[0:4]", "int8", "bfloat16", 3),
    "UnknownTensorError": ("model.norm.weight", 5),
    "ShapeError": ("model.norm.weight", 1, "(4,)", "(8,)"),
    "ModelMismatchError": ("model.norm.weight", "no such parameter"),
    "UnusedTensorError": (("a", "b", "c", "d"),),
    "UncoveredParameterError": (("a", "b"),),
    "UnsupportedLoaderError": ("model.norm.weight", "aten.add"),
    "SessionError": ("no party came",),
    "NoRayClusterError": ("10.0.0.1:6379", "connection refused"),
    "RayAuthError": ("10.0.0.1:6379",),
    "UnknownGroupError": ("policy", "rl"),
    "VersionSkewError": ("policy", "join", "0.1.0"),
    "GroupInUseError": ("policy", 4),
    "MissingTrainerRankError": ("policy", (1, 3), 8, 30.0),
    "NotConnectedError": ("sync",),
    "CoordinatorLostError": ("policy", "its node died"),
    "BusyError": ("update", "preparing"),
    "CannotLendError": (3, "it is reading"),
    "ForgottenError": ("policy", "engine rank 3"),
    "ClosedError": ("publisher",),
    "VersionError": ("versions only grow",),
    "StaleVersionError": (3, 7, "published"),
    "NotPublishedError": (3, (0, 2), 12.5),
    "NotPreparedError": (3, None),
    "AbortedError": (3,),
    "ReleasedError": (3, (0, 1)),
    "LeaseLostError": (3,),
    "TopologyChangedError": ("policy", "it has 4 ranks"),
    "TornReadError": (3, 1),
    "SupersededError": (3, 4),
    "TransportError": ("bytes did not arrive",),
    "TransportUnavailableError": ("nixl", "no agent", "Install nixl."),
    "TransportLiesError": ("yr", 2, "left its targets as they were"),
    "SourceDiedError": (2, "exit code 9"),
    "PullTimeoutError": (2, 60.0),
    "EngineError": ("an engine failed",),
    "EngineUnreachableError": ("http://10.0.0.2:8000", "connection refused"),
    "EngineTornError": ("http://a:1", 3),
    "EngineAsleepError": ("commit",),
    "EngineRefusedError": ("http://10.0.0.2:8000", 401, "Unauthorized"),
    "UpdateFailedError": (3, "prepare", "http://10.0.0.2:8000", 1, "a read timed out"),
    "WindowMovedError": ("model.norm.weight", 3),
    "ReplicaMismatchError": ("model.norm.weight", "[0:4]", 0, 2),
    "ArenaMemoryError": (4096, "cuda:0"),
    "DeadlineError": ("trainer rank 3", 30.0, "Raise timeout_s."),
}


def subclasses(base: type[RdtError]) -> list[type[RdtError]]:
    """The class and all below it that errors.py defines; other modules may add their own."""
    below = [sub for sub in base.__subclasses__() if sub.__module__.startswith("rdt_core.error_")]
    return [base, *itertools.chain.from_iterable(map(subclasses, below))]


ALL = subclasses(RdtError)
every_error = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)


def make(kind: type[RdtError]) -> RdtError:
    make_error: Callable[..., RdtError] = kind
    return make_error(*EXAMPLES[kind.__name__])


def test_every_error_class_has_an_example_here() -> None:
    assert {kind.__name__ for kind in ALL} == set(EXAMPLES)


@every_error
def test_an_error_survives_pickle_with_its_message_and_fields(kind: type[RdtError]) -> None:
    error = make(kind)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own bytes
        assert type(again) is kind
        assert (str(again), vars(again)) == (str(error), vars(error))


@every_error
def test_an_error_survives_json_with_its_message_and_fields(kind: type[RdtError]) -> None:
    error = make(kind)
    again = from_wire(json.loads(json.dumps(to_wire(error))))
    assert type(again) is kind
    assert (str(again), vars(again)) == (str(error), vars(error))


@every_error
def test_a_message_shows_what_the_error_was_told(kind: type[RdtError]) -> None:
    message = str(make(kind))
    for value in EXAMPLES[kind.__name__]:
        if isinstance(value, str | int):
            assert str(value) in message


@pytest.mark.parametrize("version", ["seven", 0, -3, 1.5, None, True])
def test_an_invalid_version_is_shown_alike_on_both_sides_of_a_border(version: object) -> None:
    error = errors.InvalidVersionError(version)
    assert repr(version) in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes
    assert str(from_wire(json.loads(json.dumps(to_wire(error))))) == str(error)


def test_the_tree_drawn_in_the_docstring_is_the_real_one() -> None:
    drawn: dict[str, list[str]] = {}
    path = ["RdtError"]
    lines = (errors.__doc__ or "").splitlines()
    for line in lines:
        found = re.match(r"    ((?:\|   |    )*)(?:\|--|`--) (\w+)", line)
        if found:
            depth = len(found[1]) // 4 + 1
            drawn.setdefault(path[depth - 1], []).append(found[2])
            path[depth:] = [found[2]]
    real = {
        kind.__name__: sorted(sub.__name__ for sub in kind.__subclasses__() if sub in ALL)
        for kind in ALL
        if any(sub in ALL for sub in kind.__subclasses__())
    }
    assert {name: sorted(below) for name, below in drawn.items()} == real
    assert "    RdtError" in lines


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(sorted(EXAMPLES)) | json_values, json_values, json_values | st.lists(json_values))
def test_hostile_wire_content_gives_an_error_of_ours_and_raises_nothing(
    kind: object, message: object, fields: object
) -> None:
    assert isinstance(from_wire({"type": kind, "message": message, "fields": fields}), RdtError)


@given(json_values)
def test_a_wire_error_that_is_no_object_gives_a_plain_error(wire: object) -> None:
    if not isinstance(wire, dict) or "type" not in wire:
        assert type(from_wire(wire)) is RdtError


@pytest.mark.parametrize(
    "name", ["os.system", "ValueError", "Exception", "to_wire", "__class__", "", None, 3]
)
def test_a_class_that_is_not_in_the_tree_becomes_a_plain_error_with_its_message(name: object) -> None:
    error = from_wire({"type": name, "message": "engine says no", "fields": ["x"]})
    assert type(error) is RdtError
    assert str(error) == "engine says no"


@pytest.mark.parametrize("name", ["UnusedTensorError", "UncoveredParameterError", "CoverageError"])
@pytest.mark.parametrize("field", [{}, {"a": 1}, 3, None, "x", [{}]])
def test_fields_of_other_types_than_an_errors_own_give_an_error_of_ours(name: str, field: object) -> None:
    assert isinstance(from_wire({"type": name, "message": "m", "fields": [field]}), RdtError)


@pytest.mark.parametrize("fields", [[], ["a", "b", "c"], [1, {"x": 1}], "ab", None, {"a": 1}, [[]]])
def test_fields_that_do_not_fit_the_class_become_a_plain_error_with_its_message(fields: object) -> None:
    error = from_wire(
        {"type": "MissingTrainerRankError", "message": "two ranks are missing", "fields": fields}
    )
    assert type(error) is RdtError
    assert str(error) == "two ranks are missing"
