"""What can go wrong in the gateway itself.

RdtError
`-- GatewayError                a request that the gateway cannot carry out
|-- UnknownPairError
|-- PairExistsError
|-- PairBusyError
|-- UnsupportedRequestError
|-- StoreFullError
`-- TrainerWorkerError      a trainer's own HTTP routes refused or did not answer
"""

from __future__ import annotations

from rdt_core.errors import RdtError


class GatewayError(RdtError):
    """A request that the gateway cannot carry out."""


class UnknownPairError(GatewayError):
    """No pair is connected under this name."""

    def __init__(self, pair: str) -> None:
        self.pair = pair
        super().__init__(f"there is no pair {pair!r}. POST /connect with this pair_name first.", (pair,))


class PairExistsError(GatewayError):
    """A pair of this name is connected to other workers."""

    def __init__(self, pair: str) -> None:
        self.pair = pair
        super().__init__(
            f"pair {pair!r} is already connected, to other workers or another group. POST /disconnect for it "
            "first, or connect under another pair_name.",
            (pair,),
        )


class PairBusyError(GatewayError):
    """Another version of this pair is being synced."""

    def __init__(self, pair: str, running: int, asked: int) -> None:
        self.pair, self.running, self.asked = pair, running, asked
        super().__init__(
            f"pair {pair!r} is being updated to version {running}, so version {asked} was refused. A pair "
            "takes one version at a time; ask again when that one has been answered.",
            (pair, running, asked),
        )


class UnsupportedRequestError(GatewayError):
    """A feature of AReaL's gateway that rdt mode does not have."""

    def __init__(self, field: str, value: str, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}={value} cannot be used here. {remedy}", (field, value, remedy))


class StoreFullError(GatewayError):
    """The store of pair metadata has reached a bound."""

    def __init__(self, bound: str) -> None:
        self.bound = bound
        super().__init__(
            f"the metadata store is full: {bound}. Delete keys, or disconnect pairs that are done.", (bound,)
        )


class TrainerWorkerError(GatewayError):
    """A trainer's HTTP routes refused or did not answer."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(
            f"trainer worker {url}: {reason}. Check that it runs, and that its app includes "
            "rdt_core.trainer_routes.make_router.",
            (url, reason),
        )
