"""Where a version is read to: beside the parameters, to the host, or into them. Pure, on measured memory."""

from __future__ import annotations

from rdt_core.errors import ConfigError

STAGED = "staged"
PINNED = "pinned"
INPLACE = "inplace"
AUTO = "auto"
MODES = (AUTO, STAGED, PINNED, INPLACE)

RESERVE_BYTES = 256 * 2**20
"""What staging must leave free on top of its landing memory: an engine allocates a little at every step."""


def choose_mode(
    wanted: str, *, landing_nbytes: int, free_nbytes: int | None, host_nbytes: int | None = None
) -> str:
    """``"staged"``, ``"pinned"`` or ``"inplace"`` for one engine rank. Called at connect, in the rank.

    The first two read while generation goes on and cannot tear the model, so the first whose landing memory
    fits is taken. Staged lands on the rank's device; pinned in the host's memory, which a commit copies from
    at the speed of the bus and not of the device's memory.

    Args:
        wanted: ``"auto"``, or the mode that the user asked for, which is not overruled.
        landing_nbytes: memory that staged mode would allocate in this rank.
        free_nbytes: free memory measured on the rank's device; None where it cannot be measured.
        host_nbytes: this rank's part of the host's free memory; None where that is the device's own, or
            cannot be measured.

    Raises:
        ConfigError: there is no such mode.
    """
    if wanted not in MODES:
        raise ConfigError(f"mode {wanted!r} is none of {', '.join(MODES)}. Leave it out to have one chosen.")
    if wanted != AUTO:
        return wanted
    if free_nbytes is None or landing_nbytes + RESERVE_BYTES <= free_nbytes:
        return STAGED
    if host_nbytes is not None and landing_nbytes + RESERVE_BYTES <= host_nbytes:
        return PINNED
    return INPLACE
