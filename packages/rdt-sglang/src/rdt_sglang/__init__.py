"""SGLang adapter. This version only reserves the plugin's door: it cannot sync weights into SGLang yet.

Nothing is imported or registered here. SGLang finds :func:`rdt_sglang.plugin.register` through the entry
point group ``sglang.srt.plugins``.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
