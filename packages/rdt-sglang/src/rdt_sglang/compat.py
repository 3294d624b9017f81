"""Every difference between SGLang versions and platforms that this adapter knows, and nothing else does.

Each item names the SGLang file and version it mirrors; paths are relative to sglang/srt.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ConfigError, UnsupportedEngineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    import torch

BACKEND = "rdt"

_ARGS = "sglang.srt.server_args.ServerArgs"
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin"
_SCHEDULER = "sglang.srt.managers.scheduler"
_ENGINE = "sglang.srt.entrypoints.engine"
_HTTP = "sglang.srt.entrypoints.http_server"
_MARK = "_rdt_weight_sync"
_POLL_WHILE_READING_MS = 1


def sglang_version() -> str:
    """The running SGLang's version."""
    return importlib.metadata.version("sglang")


# The flag, and where the choice is kept.


def hook_server_args(add_flag: Callable[..., None], from_flag: Callable[..., None]) -> None:
    """Have SGLang call us after it has added its flags to a parser, and after it has read them.

    Called while SGLang loads its plugins; right after, it puts the hooks in place (plugins/__init__.py,
    0.5.23).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    HookRegistry.register(f"{_ARGS}.add_cli_args", add_flag, HookType.AFTER)
    HookRegistry.register(f"{_ARGS}.from_cli_args", from_flag, HookType.AFTER)


def hook_engine_arguments(from_keyword: Callable[[Any, object], None]) -> None:
    """Let :class:`sglang.Engine` take ``weight_sync``, which is none of its arguments' fields.

    ``Engine.__init__`` loads plugins and then calls ``self.server_args_class(**kwargs)``
    (entrypoints/engine.py, 0.5.23).
    """
    module = sys.modules.get(_ENGINE)
    if module is None:
        return
    engine: Any = module.Engine
    original = engine.server_args_class
    if getattr(original, "takes_weight_sync", False):
        return

    def make_server_args(*, weight_sync: object = None, **kwargs: Any) -> Any:
        server_args = original(**kwargs)
        from_keyword(server_args, weight_sync)
        return server_args

    make_server_args.takes_weight_sync = True  # type: ignore[attr-defined]  # marks our wrapper
    engine.server_args_class = staticmethod(make_server_args)


def mark(server_args: Any, choice: object) -> None:
    """Keep the choice in the arguments, which are pickled to every process.

    Names with an underscore may be set at any time and survive pickling (server_args.py, __setattr__ and
    __reduce__, 0.5.23).
    """
    setattr(server_args, _MARK, choice)


def is_chosen(server_args: Any) -> bool:
    """Whether a server with these arguments reads its weights through us."""
    return getattr(server_args, _MARK, None) is not None


def check_supported(server_args: Any) -> None:
    """Refuse what this adapter has no part for, before anything is started.

    Raises:
        ConfigError: a setting that cannot be served together with weight sync.
    """
    if getattr(server_args, "pp_size", 1) > 1:
        raise ConfigError("pipeline parallelism is not supported yet. Start with --pp-size 1.")
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        raise ConfigError("the Rust server has no routes for it. Unset SGLANG_RUST_SERVER.")
    if getattr(server_args, "encoder_only", False):
        raise ConfigError("an encoder-only server has no scheduler. Start without --encoder-only.")


# What is put into each process.


def is_frontend() -> bool:
    """Whether this process parses arguments, serves HTTP or holds an Engine."""
    import multiprocessing  # noqa: PLC0415  asked once a process

    return multiprocessing.parent_process() is None or _HTTP in sys.modules


def is_scheduler() -> bool:
    """Whether this process runs a scheduler, or will: a Ray actor imports it after its arguments arrive.

    Source: managers/scheduler.py, run_scheduler_process; ray/scheduler_actor.py (0.5.23).
    """
    ray = sys.modules.get("ray")
    if _SCHEDULER in sys.modules or ray is None or not ray.is_initialized():
        return _SCHEDULER in sys.modules
    # No Ray actor but a scheduler is given these arguments.
    return ray.get_runtime_context().get_actor_id() is not None


def offer_messages() -> None:
    """Let SGLang's queues carry our messages (managers/io_struct.py, hook_custom_types, 0.5.23). Idempotent.

    Raises:
        UnsupportedEngineError: they carry no one else's.
    """
    from sglang.srt.managers import io_struct  # noqa: PLC0415

    from rdt_sglang.messages import WeightSyncReqInput, WeightSyncReqOutput  # noqa: PLC0415

    if not hasattr(io_struct, "hook_custom_types"):
        raise UnsupportedEngineError("sglang", sglang_version(), "messages of plugins (hook_custom_types)")
    io_struct.hook_custom_types(WeightSyncReqInput, WeightSyncReqOutput)


def offer_routes(attach: Callable[[Any], None]) -> None:
    """Have ``attach`` called with every tokenizer manager, once it can reach its schedulers. Idempotent.

    Source: managers/tokenizer_control_mixin.py, _COMMUNICATOR_SPECS and init_communicators (0.5.23).

    Raises:
        UnsupportedEngineError: there is no such place.
    """
    from rdt_sglang.messages import WeightSyncReqOutput  # noqa: PLC0415

    control = importlib.import_module(_CONTROL)
    specs = getattr(control, "_COMMUNICATOR_SPECS", None)
    if not isinstance(specs, list):
        raise UnsupportedEngineError("sglang", sglang_version(), "a list of communicators to extend")
    if all(spec[0] != "weight_sync" for spec in specs):
        specs.append(("weight_sync", WeightSyncReqOutput))

    def after(result: object, manager: Any, *args: Any, **kwargs: Any) -> None:
        del result, args, kwargs
        attach(manager)

    _hook(f"{_CONTROL}.TokenizerControlMixin.init_communicators", after)


def offer_receiver(attach: Callable[[Any], None]) -> None:
    """Have ``attach`` called with this process's scheduler, once its model is loaded. Idempotent.

    Source: managers/scheduler.py, Scheduler.init_request_dispatcher (0.5.23).

    Raises:
        UnsupportedEngineError: there is no such place.
    """

    def after(result: object, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        del result, args, kwargs
        attach(scheduler)

    _hook(f"{_SCHEDULER}.Scheduler.init_request_dispatcher", after)


def _hook(target: str, after: Callable[..., None]) -> None:
    """Hook a method and make sure of it: the registry logs what it cannot do and goes on.

    Source: plugins/hook_registry.py, HookRegistry.apply_hooks (0.5.23).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    path, _, name = target.rpartition(".")
    module, _, owner = path.rpartition(".")
    holder = getattr(importlib.import_module(module), owner, None)
    if not callable(getattr(holder, name, None)):
        raise UnsupportedEngineError("sglang", sglang_version(), target)
    if getattr(getattr(holder, name), "calls_rdt", False):
        return
    HookRegistry.register(target, after, HookType.AFTER)
    HookRegistry.apply_hooks()
    hooked: Any = getattr(holder, name)
    if not hasattr(hooked, "__wrapped__"):
        raise UnsupportedEngineError("sglang", sglang_version(), f"a hook on {target}")
    hooked.calls_rdt = True


# The front: one tokenizer manager a server process.


def world_size() -> int:
    """Number of scheduler ranks of the engine; attention data parallelism lies within the tensor ranks."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    parallel = get_parallel()
    num_replicas = 1 if parallel.attn_dp_enabled else parallel.dp_size
    return int(num_replicas * parallel.tp_size * parallel.pp_size)


def num_schedulers() -> int:
    """Number of scheduler groups that answer a message, each for all of its ranks."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    return int(get_parallel().num_dp_ranks)


async def ask_schedulers(manager: Any, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Have every scheduler rank handle a message at its next safe point; one answer a rank, in rank order.

    With attention data parallelism several leaders answer for the same ranks.
    """
    from rdt_sglang.messages import WeightSyncReqInput  # noqa: PLC0415

    manager.auto_create_handle_loop()
    outputs = await manager.weight_sync_communicator(WeightSyncReqInput.make(method, payload))
    by_rank = {answer["rank"]: answer for output in outputs for answer in output.answers}
    return [answer for _, answer in sorted(by_rank.items())]


@contextlib.asynccontextmanager
async def hold_pauses(manager: Any) -> AsyncIterator[None]:
    """No pause and no continue of the server takes effect meanwhile; new requests wait for the few ms.

    SGLang's own updates hold the same lock (managers/tokenizer_control_mixin.py, 0.5.23).
    """
    async with manager.is_pause_cond:
        yield


def abort_all(manager: Any) -> None:
    """End every request in flight with what it has generated."""
    manager.abort_request(abort_all=True)


def label_server(manager: Any, version: str) -> None:
    """What ``/model_info`` says from now on."""
    manager._update_weight_version_if_provided(version)


def server_keys() -> tuple[str, ...]:
    """The keys of which one opens the control routes: the admin key, else the API key.

    Source: utils/auth.py, decide_request_auth for AuthLevel.ADMIN_OPTIONAL (0.5.23).
    """
    from sglang.srt.runtime_context import get_serving  # noqa: PLC0415

    serving = get_serving()
    key = serving.admin_api_key or serving.api_key
    return (key,) if key else ()


def server_url() -> str:
    """Where this server listens, as its own name among a group's engines."""
    from sglang.srt.runtime_context import get_serving  # noqa: PLC0415

    serving = get_serving()
    return f"http://{serving.host}:{serving.port}"


def http_app() -> Any | None:
    """SGLang's FastAPI application; None in a process that serves no HTTP."""
    module = sys.modules.get(_HTTP)
    return getattr(module, "app", None)


def add_middleware(app: Any, middleware: type, **options: Any) -> None:
    """Put a middleware in front of SGLang's application, unless it serves already.

    Further tokenizer workers make their manager when the application has started (entrypoints/http_server.py,
    lifespan, 0.5.23); they go without, and requests wait in the scheduler.
    """
    if getattr(app, "middleware_stack", None) is None:
        app.add_middleware(middleware, **options)


def require_admin(routes: Sequence[Any]) -> None:
    """Mark routes so that SGLang's own guard asks for the admin key, not for the API key as well.

    Source: utils/auth.py, auth_level (0.5.23).
    """
    from sglang.srt.utils.auth import AuthLevel, auth_level  # noqa: PLC0415

    for route in routes:
        auth_level(AuthLevel.ADMIN_OPTIONAL)(route.endpoint)


def offer_engine_methods(methods: dict[str, Callable[..., Any]]) -> None:
    """Give :class:`sglang.Engine` methods, where this process has loaded it. Idempotent."""
    module = sys.modules.get(_ENGINE)
    for name, method in methods.items() if module is not None else ():
        setattr(module.Engine, name, method)  # type: ignore[union-attr]  # not None, see above


# The back: one scheduler a rank.


@dataclass(frozen=True, slots=True)
class Place:
    """Where one scheduler rank stands in its engine."""

    rank: int
    world_size: int
    device: torch.device


def find_place(scheduler: Any) -> Place:
    """This scheduler's rank among all ranks of the engine: data parallel, pipeline, tensor."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    parallel = get_parallel()
    replica = 0 if parallel.attn_dp_enabled else (parallel.dp_rank or 0)
    rank = (replica * parallel.pp_size + parallel.pp_rank) * parallel.tp_size + parallel.tp_rank
    parameter = next(model_of(scheduler).parameters())
    return Place(int(rank), world_size(), parameter.device)


def model_of(scheduler: Any) -> Any:
    """The model that this rank serves; draft models of speculative decoding are not synced."""
    return scheduler.tp_worker.model_runner.model


def handle_messages(scheduler: Any, handle: Callable[[Any], Any]) -> None:
    """Have the scheduler pass our messages to ``handle`` between two batches."""
    from sglang.utils import TypeBasedDispatcher  # noqa: PLC0415

    from rdt_sglang.messages import WeightSyncReqInput  # noqa: PLC0415

    scheduler._request_dispatcher += TypeBasedDispatcher([(WeightSyncReqInput, handle)])


def guard_resumption(scheduler: Any, may_resume: Callable[[], bool]) -> None:
    """Have the scheduler ignore requests to continue while its model is torn.

    Source: managers/scheduler.py, init_request_dispatcher (0.5.23).
    """
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # noqa: PLC0415

    original = scheduler._request_dispatcher._mapping[ContinueGenerationReqInput]

    def resume(request: Any) -> Any:
        return original(request) if may_resume() else None

    scheduler._request_dispatcher._mapping[ContinueGenerationReqInput] = resume


def gather(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every tensor-parallel rank's answer, on all of them. All ranks must call it in the same order."""
    import torch  # noqa: PLC0415  the entry point, which imports this file, loads without it
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    group = get_parallel().tp_group.cpu_group
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return [answer]
    answers: list[Any] = [None] * size
    torch.distributed.all_gather_object(answers, answer, group=group)
    return answers


def is_in_update(scheduler: Any) -> bool:
    """Whether one of SGLang's own update sessions is open, in which parameters may be laid out anew."""
    return getattr(scheduler.weight_updater, "_session", None) is not None


def is_paused(scheduler: Any) -> bool:
    """Whether generation is held, by a user or by us."""
    return bool(scheduler._engine_paused)


def retract_all(scheduler: Any) -> None:
    """Hold generation, give up the KV cache of every request, and queue the requests to be computed again.

    Source: managers/scheduler.py, pause_generation in mode ``retract`` (0.5.23).
    """
    from sglang.srt.managers.io_struct import PauseGenerationReqInput  # noqa: PLC0415

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))


def hold(scheduler: Any) -> None:
    """Hold generation where it stands."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput  # noqa: PLC0415

    scheduler.pause_generation(PauseGenerationReqInput(mode="in_place"))


def let_go(scheduler: Any) -> None:
    """Resume generation."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # noqa: PLC0415

    scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))


def drop_caches(scheduler: Any) -> bool:
    """Drop what was computed with the old weights; False, and nothing is dropped, while something holds it.

    Called after :func:`retract_all`. What may still hold it: a grammar that is being compiled, a transfer of
    KV cache (managers/scheduler.py, is_fully_idle, 0.5.23).
    """
    return bool(scheduler.flush_cache(empty_cache=False))


def label_outputs(scheduler: Any, version: str) -> None:
    """Label what is generated from now on (managers/scheduler.py, record_weight_version_change, 0.5.23)."""
    scheduler.record_weight_version_change(new_version=version)


def use_device(device: torch.device) -> None:
    """Make the device this thread's own; a new thread begins with the first one of the host."""
    if device.type != "cpu":
        import torch  # noqa: PLC0415  see gather

        torch.get_device_module(device).set_device(device)


def wait_for_device(device: torch.device) -> None:
    """Until the device has done what was asked of it: a batch in flight, or copies into parameters."""
    if device.type != "cpu":
        import torch  # noqa: PLC0415  see gather

        torch.get_device_module(device).synchronize(device)


def yield_while(scheduler: Any, is_reading: Callable[[], bool]) -> None:
    """While a read is under way, have the idle scheduler wait for its sockets instead of asking them.

    A reader's thread takes the interpreter lock some dozens of times a read, and beside the asking loop each
    time costs a millisecond. A request that arrives ends the wait at once. SGLang's own ``--sleep-on-idle``
    does the same all the time and is left alone.

    Source: managers/scheduler.py, IdleSleeper and maybe_sleep_on_idle (0.5.23).
    """
    if getattr(scheduler, "idle_sleeper", None) is None and hasattr(scheduler, "maybe_sleep_on_idle"):
        scheduler.idle_sleeper = _SleepWhileReading(scheduler, is_reading)


class _SleepWhileReading:
    def __init__(self, scheduler: Any, is_reading: Callable[[], bool]) -> None:
        import zmq  # noqa: PLC0415  SGLang's own

        self._is_reading = is_reading
        self._poller = zmq.Poller()
        channels = scheduler.ipc_channels
        for socket in (channels.recv_from_tokenizer, channels.recv_from_rpc):
            if isinstance(socket, zmq.Socket):
                self._poller.register(socket, zmq.POLLIN)

    def maybe_sleep(self) -> None:
        if self._is_reading():
            self._poller.poll(_POLL_WHILE_READING_MS)


def loading(scheduler: Any) -> contextlib.AbstractContextManager[None]:
    """What SGLang's loaders expect around them: the model's dtype as torch's default.

    Source: model_loader/loader.py, DefaultModelLoader.load_model (0.5.23).
    """
    return _default_dtype(scheduler.tp_worker.model_runner.model_config.dtype)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch  # noqa: PLC0415  see gather

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
    return find(model) if find is not None else None


def is_shuffled(method: object) -> bool:
    """Whether expert weights may be shuffled for ROCm's AITER (layers/quantization/unquant.py, 0.5.23)."""
    return bool(getattr(sys.modules.get(type(method).__module__), "_use_aiter", False))
