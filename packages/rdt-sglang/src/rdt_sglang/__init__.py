"""SGLang adapter: an engine started with ``--weight-sync rdt`` reads its weights from a live trainer.

Nothing is imported or registered here. SGLang finds :func:`rdt_sglang.plugin.register` through the entry
point group ``sglang.srt.plugins`` and calls it in most of its processes.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
