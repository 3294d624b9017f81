"""A client that sends and reads what AReaL's ``WeightUpdateController`` does, field by field.

Written from its wire contract, not from its code: the requests of its gateway at commit cbff54d and, as
``NewerArealClient``, what the controller sends since it has operation ids. It knows nothing of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx

REQUEST_TIMEOUT_S = 120.0


@dataclass
class ArealUpdate:
    """The four fields that the controller reads."""

    status: str
    version: int
    duration_ms: float
    error: str | None


class ArealClient:
    """Health, connect, update, disconnect with a bearer key."""

    def __init__(self, url: str, admin_api_key: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S)
        self._http.headers["Authorization"] = f"Bearer {admin_api_key}"
        self._pair_name = ""

    def is_healthy(self) -> bool:
        answer = self._http.get("/health")
        return answer.status_code == 200 and answer.json()["status"] == "healthy"

    def connect(self, pair_name: str, train_worker_urls: list[str], inference_worker_urls: list[str]) -> None:
        answer = self._http.post(
            "/connect", json=self.connect_fields(pair_name, train_worker_urls, inference_worker_urls)
        )
        answer.raise_for_status()
        assert answer.json()["pair_name"] == pair_name
        self._pair_name = pair_name

    def connect_fields(self, pair_name: str, trainers: list[str], engines: list[str]) -> dict[str, Any]:
        return {
            "pair_name": pair_name,
            "train_worker_urls": trainers,
            "inference_worker_urls": engines,
            "nccl_master_addr": "",
            "nccl_master_port": 0,
            "mode": "rdt",
            "save_path": "",
            "use_lora": False,
            "lora_name": "",
            "lora_keep_versions": 0,
            "colocate": False,
        }

    def update_weights(self, version: int) -> ArealUpdate:
        answer = self._http.post("/update_weights", json={"pair_name": self._pair_name, "version": version})
        answer.raise_for_status()
        data = answer.json()
        return ArealUpdate(data["status"], data["version"], data["duration_ms"], data.get("error"))

    def disconnect(self) -> None:
        answer = self._http.post("/disconnect", json=self.disconnect_fields())
        answer.raise_for_status()
        assert answer.json() == {"status": "ok", "pair_name": self._pair_name}

    def disconnect_fields(self) -> dict[str, Any]:
        return {"pair_name": self._pair_name}

    def close(self) -> None:
        self._http.close()


class NewerArealClient(ArealClient):
    """The same since operation ids: more fields out, and one more that is read from an update's answer."""

    def connect_fields(self, pair_name: str, trainers: list[str], engines: list[str]) -> dict[str, Any]:
        return {
            **super().connect_fields(pair_name, trainers, engines),
            "operation_id": uuid4().hex,
            "setup_timeout_s": None,
            "rollback_timeout_s": 30.0,
        }

    def disconnect_fields(self) -> dict[str, Any]:
        return {**super().disconnect_fields(), "operation_id": uuid4().hex, "timeout_s": None}
