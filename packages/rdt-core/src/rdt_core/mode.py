"""Where a version is read to: beside the parameters or into them. A pure decision, on measured memory."""

from __future__ import annotations

from rdt_core.errors import ConfigError

STAGED = "staged"
INPLACE = "inplace"
AUTO = "auto"
MODES = (AUTO, STAGED, INPLACE)

RESERVE_BYTES = 256 * 2**20
"""What staging must leave free on top of its landing memory: an engine allocates a little at every step."""


def choose_mode(wanted: str, *, landing_nbytes: int, free_nbytes: int | None) -> str:
    """``"staged"`` or ``"inplace"`` for one engine rank. Called at connect, in the rank.

    Staged reads while generation goes on and cannot tear the model, so it is taken whenever its landing
    memory fits.

    Args:
        wanted: ``"auto"``, or the mode that the user asked for, which is not overruled.
        landing_nbytes: memory that staged mode would allocate in this rank.
        free_nbytes: free memory measured on the rank's device; None where it cannot be measured.

    Raises:
        ConfigError: there is no such mode.
    """
    if wanted not in MODES:
        raise ConfigError(f"mode {wanted!r} is none of {', '.join(MODES)}. Leave it out to have one chosen.")
    if wanted != AUTO:
        return wanted
    if free_nbytes is None or landing_nbytes + RESERVE_BYTES <= free_nbytes:
        return STAGED
    return INPLACE
