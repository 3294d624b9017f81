"""What the coordinator's process asks of its system."""

from __future__ import annotations

import resource

from rdt_core.process_limits import open_many_files


def test_a_process_may_hold_as_many_files_as_its_system_gives() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = before[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
        open_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
