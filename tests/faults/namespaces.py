"""Two network namespaces with a link between them that can be cut: two machines, as far as TCP can tell.

The process that calls :func:`two_hosts` moves into the first; the second is for what it starts there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAR, FAR = "10.89.0.1", "10.89.0.2"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
# UCX looks there for its devices; a mount shows those of the namespace that made it.
_SHOW_DEVICES = ["mount", "-t", "sysfs", "sysfs", "/sys"]
_HOLD = f"{' '.join(_SHOW_DEVICES)} && echo && exec sleep infinity"
LINK = "rdt0"
"""The name of either end."""


class ImpossibleHereError(Exception):
    """This machine does not let us."""


@dataclass(frozen=True, slots=True)
class FarHost:
    """The other namespace.

    Args:
        pid: of a process that holds it open.
    """

    pid: int

    def command(self, *words: str) -> list[str]:
        """What runs these words there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", *words]

    def cut(self) -> None:
        """No packet crosses the link any more. The near side is not told: its packets go nowhere."""
        _run(self.command("ip", "link", "set", LINK, "down"))

    def mend(self) -> None:
        """The link is as it was."""
        _run(self.command("ip", "link", "set", LINK, "up"))
        _run(self.command("ip", "route", "replace", "default", "via", NEAR))


@contextlib.contextmanager
def two_hosts() -> Iterator[FarHost]:
    """Move this process, which has no socket open yet, into a namespace of its own, and make another.

    Raises:
        ImpossibleHereError: that needs root, and a kernel and container that allow it.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        raise ImpossibleHereError(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
    _run(["mount", "--make-rprivate", "/"])
    _run(_SHOW_DEVICES)
    hold = ["unshare", "--net", "--mount", "sh", "-c", _HOLD]
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as holder:
        try:
            if not holder.stdout or not holder.stdout.readline():
                raise ImpossibleHereError("unshare makes no second namespace in which sysfs can be mounted")
            far = FarHost(holder.pid)
            _run(["ip", "link", "set", "lo", "up"])
            _run(["ip", "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(holder.pid)])
            _run(["ip", "address", "add", f"{NEAR}/24", "dev", LINK])
            _run(["ip", "link", "set", LINK, "up"])
            # Nothing goes there; Ray finds its own address by asking which one would be used.
            _run(["ip", "route", "add", "default", "via", FAR])
            _run(far.command("ip", "link", "set", "lo", "up"))
            _run(far.command("ip", "address", "add", f"{FAR}/24", "dev", LINK))
            far.mend()
            yield far
        finally:
            holder.kill()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ImpossibleHereError(f"{error.filename} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise ImpossibleHereError(f"{' '.join(command)}: {error.stderr.strip()}") from error
