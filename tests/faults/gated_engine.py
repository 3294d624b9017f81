"""The toy engine with gates (see ``gates``). Run as ``python -m tests.faults.gated_engine --port P``."""

from __future__ import annotations

from rdt_core import subscriber
from tests.faults.gates import gate_model, gate_subscriber
from tests.integration import toy_engine


def main() -> None:
    """Serve until ended."""
    gate_subscriber(subscriber)
    gate_model(toy_engine.ToyEngineModel)
    toy_engine.main()


if __name__ == "__main__":
    main()
