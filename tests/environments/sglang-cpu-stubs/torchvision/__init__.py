"""Stands for torchvision: importable, and without transforms."""

from __future__ import annotations

from absent_package import stand_in

stand_in("torchvision")
