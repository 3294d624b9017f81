"""Checkpoints and a Ray cluster, as the end-to-end tests have them."""

from __future__ import annotations

from tests.e2e.conftest import checkpoint, ray_address

__all__ = ["checkpoint", "ray_address"]
