"""Parameter names without the marks that training wrappers leave in them."""

from __future__ import annotations

import re

# Each wrapper keeps the wrapped module under one attribute, which shows up in every name below it.
# "module" is left by DistributedDataParallel and Megatron's wrappers, at the front only; the others
# may stand anywhere, since torch.compile and activation checkpointing are applied layer by layer.
_ANYWHERE = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_WRAPPED = re.compile("|".join(sorted(_ANYWHERE)))
_IN_FRONT = "module."


def strip_wrappers(name: str) -> str:
    """The name that the parameter has in the bare model.

    >>> strip_wrappers("module._orig_mod.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    bare = name
    if _WRAPPED.search(name):
        bare = ".".join(part for part in name.split(".") if part not in _ANYWHERE)
    while bare.startswith(_IN_FRONT):
        bare = bare.removeprefix(_IN_FRONT)
    return bare
