"""vLLM adapter: an engine started with ``--weight-sync rdt`` reads its weights from a live trainer.

Nothing is imported or registered here. vLLM finds :func:`rdt_vllm.plugin.register` through the entry
point group ``vllm.general_plugins`` and calls it in each of its processes.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
