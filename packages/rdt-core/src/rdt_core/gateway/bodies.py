"""Requests and answers of the gateway, field by field as AReaL's clients send and read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

PairName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:@+-]+$")]
_HOST = r"([A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,31}|\[[0-9A-Fa-f:.]{2,45}\])"
WorkerUrl = Annotated[
    str,
    StringConstraints(
        max_length=2000, pattern=rf"^https?://{_HOST}(:[0-9]{{1,5}})?(/[A-Za-z0-9_./~-]{{0,500}})?$"
    ),
]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
MAX_WORKERS = 4096


class ConnectBody(BaseModel):
    """Trainers are named by ``group``, or by ``train_worker_urls`` whose routes tell the group."""

    pair_name: PairName
    group: Annotated[str, StringConstraints(max_length=200)] = ""
    train_worker_urls: Annotated[list[WorkerUrl], Field(max_length=MAX_WORKERS)] = []
    inference_worker_urls: Annotated[list[WorkerUrl], Field(min_length=1, max_length=MAX_WORKERS)]
    mode: str = "rdt"
    setup_timeout_s: Seconds | None = None
    use_lora: bool = False
    colocate: bool = False
    # What other modes of AReaL's gateway need; accepted, and without effect in rdt mode.
    operation_id: str = ""
    nccl_master_addr: str = ""
    nccl_master_port: int = 0
    save_path: str = ""
    lora_name: str = ""
    lora_keep_versions: int = 0
    rollback_timeout_s: Seconds | None = None


class UpdateBody(BaseModel):
    """``version`` is the trainer's step; the same pair and version is run once, however often it is asked.

    ``mode``: ``"rdt"`` leaves each engine in the mode it reads in; the others change it.
    """

    pair_name: PairName
    version: int = 0
    mode: Literal["rdt", "staged", "pinned", "inplace"] = "rdt"
    kv_cache: Literal["recompute", "keep"] = "recompute"
    timeout_s: Seconds | None = None


class DisconnectBody(BaseModel):
    """``operation_id`` and ``timeout_s`` are sent by newer clients; a disconnect has deadlines of its own."""

    pair_name: PairName
    operation_id: str = ""
    timeout_s: float | None = None


class HealthAnswer(BaseModel):
    """The process serves. Says nothing about pairs."""

    status: str = "healthy"


class ConnectAnswer(BaseModel):
    """The pair is connected: every engine rank has planned its reads and opened its links."""

    pair_name: str
    group: str
    num_engines: int
    num_engine_ranks: int


class UpdateAnswer(BaseModel):
    """Of a completed update and, with another HTTP status, of a failed one.

    ``inference_weights_may_be_mutated`` is false when the engines certainly serve what they served before.
    ``failed_engines`` has the error of every engine that did not follow the others, by URL; only where each
    commits for itself.
    """

    status: Literal["ok", "error"] = "ok"
    version: int
    duration_ms: float
    error: str | None = None
    error_type: str | None = None
    phases: dict[str, float] = {}
    inference_weights_may_be_mutated: bool = True
    failed_engines: dict[str, str] = {}


class ErrorAnswer(BaseModel):
    """Every other error."""

    error: str
    error_type: str


class DisconnectAnswer(BaseModel):
    """The engines have left the group and the trainers' workers were torn down."""

    status: str = "ok"
    pair_name: str


class PairAnswer(BaseModel):
    """One pair, for people and tools."""

    pair_name: str
    group: str
    state: Literal["connecting", "connected", "updating"]
    version: int
    running_version: int | None
    engines: list[str]
    trainer_workers: list[str]
    last_error: str | None


class PairsAnswer(BaseModel):
    """All pairs, by name."""

    pairs: list[PairAnswer]


class StoredValue(BaseModel):
    """Any JSON value."""

    value: Any = None


class SetMember(BaseModel):
    """A member of a set."""

    value: Annotated[str, StringConstraints(max_length=4096)] = ""


class StatusAnswer(BaseModel):
    """Done."""

    status: str = "ok"


class DeletedAnswer(BaseModel):
    """Done; ``deleted`` tells whether there was such a key."""

    status: str = "ok"
    deleted: bool


class SizeAnswer(BaseModel):
    """Members of a set."""

    size: int
