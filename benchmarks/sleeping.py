"""An engine that sleeps: what it gives away, that an update leaves it alone, and the update after its sleep.

Both engines' benchmarks put their engine to sleep in their own way, see :class:`Sleeper`.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from rdt_core.engine_http import EngineHttp
from rdt_core.errors import UpdateFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rdt_core import WeightSync

TIMEOUT_S = 120.0
MODES = ("staged", "inplace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleeper:
    """How one engine is put to sleep, woken and asked. Each call blocks until it is done.

    Args:
        sleep: gives away the memory of weights and KV cache.
        wake_weights: gives the weights memory again.
        wake_rest: gives the KV cache memory again; generation goes on.
        answer: the log-probabilities of a prompt's tokens, of the same prompt at each call.
    """

    sleep: Callable[[], None]
    wake_weights: Callable[[], None]
    wake_rest: Callable[[], None]
    answer: Callable[[], list[float]]


def measure_sleep(sync: WeightSync, trainer: Any, versions: Iterable[int], engine: Sleeper) -> dict[str, Any]:
    """One sleep, in which a version is published, and the update to that version when it is over.

    The version that the engine sleeps through has the weights of the first, so that their answers are equal;
    other weights are synced between the two.

    Args:
        sync: of this engine alone, in the mode that is measured.
        trainer: an actor of :class:`hf_trainer.HfTrainer`.
        versions: the next three, the first one odd.
        engine: no request is in flight there.
    """
    first, other, missed = versions
    (url,) = sync.engines
    publish_and_update(sync, trainer, first)
    before = engine.answer()
    publish_and_update(sync, trainer, other)
    of_others = engine.answer()
    awake = used_gpu_bytes()
    engine.sleep()
    asleep, kept = used_gpu_bytes(), held(url)
    ray.get(trainer.publish.remote(missed), timeout=TIMEOUT_S)
    refusal = be_refused(sync, missed)
    is_left_alone = held(url) == kept
    engine.wake_weights()
    report = sync.update(missed, timeout_s=TIMEOUT_S)
    is_equal = sync.verify(timeout_s=TIMEOUT_S).bytes_equal
    engine.wake_rest()
    seconds = {"prepare": report.prepare_s, "commit": report.commit_s, "total": report.total_s}
    return {
        "gpu_bytes_awake": awake,
        "gpu_bytes_asleep": asleep,
        **refusal,
        "is_left_alone": is_left_alone,
        "update_ms": {phase: round(1e3 * value, 3) for phase, value in seconds.items()},
        "bytes_equal": is_equal,
        "difference_of_other_weights": greatest_difference(before, of_others),
        "difference": greatest_difference(before, engine.answer()),
    }


def publish_and_update(sync: WeightSync, trainer: Any, version: int) -> None:
    """One sync, with nothing beside it."""
    ray.get(trainer.publish.remote(version), timeout=TIMEOUT_S)
    sync.update(version, timeout_s=TIMEOUT_S)


def be_refused(sync: WeightSync, version: int) -> dict[str, Any]:
    """What an update of an engine that sleeps ends with, and after how long.

    Raises:
        RuntimeError: it did not end with an error.
    """
    started = time.perf_counter()
    try:
        sync.update(version, timeout_s=TIMEOUT_S)
    except UpdateFailedError as error:
        refusal_ms = 1e3 * (time.perf_counter() - started)
        return {"refused_by": type(error.__cause__).__name__, "refusal_ms": round(refusal_ms, 3)}
    raise RuntimeError(f"an engine that was to sleep took version {version}. Look into its log.")


def held(url: str) -> list[tuple[Any, ...]]:
    """What every rank of an engine says that it serves, and how it came to that."""
    with contextlib.closing(EngineHttp(url)) as engine:
        ranks = engine.call("status", {}, timeout_s=TIMEOUT_S)["ranks"]
    return [tuple(rank[name] for name in ("version", "prepared", "is_torn", "last_commit")) for rank in ranks]


def greatest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Over the tokens of a prompt."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def used_gpu_bytes() -> int:
    """Memory in use on all GPUs, by all processes."""
    pairs = [torch.cuda.mem_get_info(gpu) for gpu in range(torch.cuda.device_count())]
    return sum(total - free for free, total in pairs)
