"""The body of ``POST /update_weights_from_rdt``, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from rdt_core import choice, engine_rpc
from rdt_core.errors import WireFormatError
from rdt_core.mode import AUTO, MODES

if TYPE_CHECKING:
    from collections.abc import Mapping

_WHAT = "update request"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "group": str,
    "flush_cache": bool,
    "abort_all_requests": bool,
    "weight_version": (str, type(None)),
    "mode": str,
    "ray_address": str,
    "ray_auth_mode": str,
    "transport": str,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """One whole update, as SGLang's own update routes put it.

    Args:
        group: name under which the trainer ranks attached.
        version: published by all of them.
        mode: ``"staged"`` reads beside generation, then flips; ``"inplace"`` reads into the parameters while
            generation is held; ``"auto"`` takes the first where its memory fits.
        flush_cache: drop what the old weights left in the KV cache and compute running requests again from
            their tokens; otherwise they go on with what they have.
        abort_all_requests: end the requests in flight before the flip.
        weight_version: what the engine's answers are labelled with; the version itself by default.
        ray_address: ``host:port`` of the cluster; empty for ``RAY_ADDRESS``, else the one on this host.
        ray_auth_mode: the trainer's ``RAY_AUTH_MODE``; never a token.
        transport: for every link; by default each link chooses.
        timeout_s: for each wait, in seconds.
    """

    group: str
    version: int
    mode: str = AUTO
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    ray_address: str = ""
    ray_auth_mode: str = ""
    transport: str = choice.AUTO
    timeout_s: float = 60.0

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> UpdateRequest:
        """A checked request.

        Raises:
            WireFormatError: a field is unknown, missing or of the wrong type.
        """
        unknown = set(body) - {field.name for field in fields(cls)}
        if unknown:
            raise WireFormatError(_WHAT, f"unknown fields {sorted(unknown)}")
        for name, kind in _TYPES.items():
            if name in body and not isinstance(body[name], kind):
                raise WireFormatError(_WHAT, f"{name} has the wrong type: {type(body[name]).__name__}")
        if not body.get("group"):
            raise WireFormatError(_WHAT, "group is missing")
        if body.get("mode", AUTO) not in MODES:
            raise WireFormatError(_WHAT, f"mode must be one of {', '.join(MODES)}, got {body['mode']!r}")
        checked = {"version": engine_rpc.parse_version(body), "timeout_s": engine_rpc.parse_timeout(body)}
        return cls(**{**body, **checked})

    @property
    def label(self) -> str:
        """What the engine's answers are labelled with."""
        return self.weight_version or str(self.version)

    def is_met_by(self, state: Mapping[str, Any]) -> bool:
        """Whether a rank in this state is connected as the request wants it."""
        return state["group"] == self.group and self.mode in (AUTO, state["mode"])

    def connect_payload(self) -> dict[str, Any]:
        """The part that joins the group."""
        names = ("group", "ray_address", "ray_auth_mode", "transport", "mode", "timeout_s")
        return {name: getattr(self, name) for name in names}

    def commit_payload(self) -> dict[str, Any]:
        """The part that flips."""
        kv_cache = "recompute" if self.flush_cache else "keep"
        return {
            "version": self.version,
            "kv_cache": kv_cache,
            "label": self.label,
            "timeout_s": self.timeout_s,
        }
