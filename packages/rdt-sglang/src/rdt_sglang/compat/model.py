"""The model of one scheduler rank: its device, its loaders, what SGLang derives from its weights."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdt_core.errors import UnsupportedEngineError
from rdt_sglang.compat.arguments import sglang_version

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def model_of(scheduler: Any) -> Any:
    """The model that this rank serves; draft models of speculative decoding are not synced."""
    return scheduler.tp_worker.model_runner.model


def model_source(scheduler: Any) -> tuple[str, str | None]:
    """What the engine was started from: a folder or a repository's name, and the repository's revision."""
    config = scheduler.tp_worker.model_runner.model_config
    return str(config.model_path), getattr(config, "revision", None)


def find_folder(model_path: str, revision: str | None) -> Path | None:
    """The folder on this host that holds a model; None where there is none. Asks no network."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  SGLang's own
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    if Path(model_path).is_dir():
        return Path(model_path)
    try:
        return Path(snapshot_download(model_path, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def use_device(device: torch.device) -> None:
    """Make the device this thread's own; a new thread begins with the first one of the host."""
    if device.type != "cpu":
        import torch  # noqa: PLC0415  this file is imported by the entry point

        torch.get_device_module(device).set_device(device)


def wait_for_device(device: torch.device) -> None:
    """Until the device has done what was asked of it: a batch in flight, or copies into parameters."""
    if device.type != "cpu":
        import torch  # noqa: PLC0415  this file is imported by the entry point

        torch.get_device_module(device).synchronize(device)


def loading(scheduler: Any) -> contextlib.AbstractContextManager[None]:
    """What SGLang's loaders expect around them: the model's dtype as torch's default.

    Source: model_loader/loader.py, DefaultModelLoader.load_model (0.5.23).
    """
    return _default_dtype(scheduler.tp_worker.model_runner.model_config.dtype)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch  # noqa: PLC0415  this file is imported by the entry point

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def derived_cache_error(model: Any) -> str | None:
    """Why SGLang itself would refuse an update of this model: a cache that it cannot bring up to date.

    Source: model_executor/model_runner_components/weight_updater.py, _unsupported_derived_weight_cache_error
    (0.5.23); older versions have none.
    """
    try:
        module = importlib.import_module("sglang.srt.model_executor.model_runner_components.weight_updater")
    except ModuleNotFoundError:
        return None
    find = getattr(module, "_unsupported_derived_weight_cache_error", None)
    if find is None:
        return None
    # In 0.5.17 it looks at settings of the process only.
    error: str | None = find(model) if inspect.signature(find).parameters else find()
    return error


@contextlib.contextmanager
def unpacked_weights(scheduler: Any) -> Iterator[None]:
    """Weights laid out as the loader writes them, where SGLang packs them in place and can undo it.

    In the scheduler's thread, with no batch under way. The same as its own updates do around loads
    (model_executor/model_runner_components/weight_updater.py, begin_weight_update and end_weight_update,
    0.5.23), less the post-load hook of the model.

    Raises:
        UnsupportedEngineError: this SGLang cannot undo it.
    """
    updater = getattr(scheduler.tp_worker.model_runner, "weight_updater", None)
    if not hasattr(updater, "begin_weight_update"):
        raise UnsupportedEngineError("sglang", sglang_version(), "weights that can be unpacked")
    updater.begin_weight_update()  # type: ignore[union-attr]  # it has that method, see above
    try:
        yield
    finally:
        updater.end_weight_update(run_post_load=False)  # type: ignore[union-attr]


def is_shuffled(method: object) -> bool:
    """Whether expert weights may be shuffled for ROCm's AITER (layers/quantization/unquant.py, 0.5.23)."""
    return bool(getattr(sys.modules.get(type(method).__module__), "_use_aiter", False))
