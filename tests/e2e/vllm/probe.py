"""A vLLM engine inside this process, taken from checkpoint to checkpoint by weight sync.

``main`` takes ``--model DIR [--sync DIR ...] --out FILE`` and is called once a process (``probe_forks``),
since an engine cannot be taken down within one. Writes JSON: after loading, and after every sync, the greedy
answers and a digest of every tensor that the model's modules hold, parameters and derived ones alike. The
trainer is this process too: it writes each checkpoint into one set of tensors and publishes them, as an
optimizer would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rdt_core.client import LocalChannel
from rdt_core.publisher import WeightPublisher
from rdt_core.subscriber import WeightSubscriber
from tests.e2e.trainer import CheckpointTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROMPTS = ("w3 w14 w15 w92", "w65 w35 w89 w79 w32 w38 w46", "w2")
NUM_TOKENS = 12


def digest_state(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor held by a module, its attention backend or its expert kernel, by path."""
    return {
        f"{name}.{part}{attribute}": _digest(tensor)
        for name, module in model.named_modules()
        for part, holder in _holders(module)
        for attribute, tensor in _tensors_of(holder)
        if attribute != "kv_cache"
    }


def _holders(module: torch.nn.Module) -> Iterator[tuple[str, object]]:
    yield "", module
    yield "impl.", getattr(module, "impl", None)
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    yield "experts.", getattr(kernel, "fused_experts", None)


def _tensors_of(holder: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(holder, torch.nn.Module):
        yield from holder.named_parameters(recurse=False)
        yield from holder.named_buffers(recurse=False)
    for name, value in vars(holder).items() if holder is not None else ():
        if isinstance(value, torch.Tensor):
            yield name, value


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode() + raw).hexdigest()


class Probe:
    """The engine, its greedy answers and its state."""

    def __init__(self, model: Path, *, backend: str | None, dtype: str) -> None:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self._llm = LLM(
            str(model),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=4,
            weight_transfer_config=WeightTransferConfig(backend=backend) if backend else None,
        )
        self.worker: Any = self._llm.llm_engine.model_executor.driver_worker.worker

    def observe(self) -> dict[str, Any]:
        self._llm.reset_prefix_cache()
        return {"answers": self._answer(), "state": digest_state(self.worker.get_model())}

    def _answer(self) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        return [list(done.outputs[0].token_ids) for done in self._llm.generate(list(PROMPTS), sampling)]

    def call(self, method: str, **payload: object) -> Any:
        (answer,) = self._llm.collective_rpc("rdt_call", args=(method, payload))
        if not answer["ok"]:
            raise RuntimeError(answer["error"]["message"])
        return answer["result"]


def sync_all(probe: Probe, first: Path, folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Connect, then bring the engine to each checkpoint in turn."""
    trainer, channel = CheckpointTrainer(first), LocalChannel("probe")
    receiver = probe.worker.weight_transfer_engine
    receiver._subscriber = WeightSubscriber(receiver._subscriber._model, channel=channel)
    with WeightPublisher.attach("probe", trainer.shards(), channel=channel) as publisher:
        probe.call("connect", group="probe", engine="probe", transport="memory")
        for version, folder in enumerate(folders, start=1):
            trainer.write(folder)
            publisher.publish(version)
            probe.call("prepare", version=version)
            probe.call("commit", version=version)
            yield probe.observe()
        probe.call("disconnect")


def main(arguments: Sequence[str]) -> None:
    """Load, sync, write what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sync", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    probe = Probe(args.model, backend=args.backend, dtype=args.dtype)
    seen = [probe.observe(), *(sync_all(probe, args.model, args.sync) if args.sync else ())]
    args.out.write_text(json.dumps(seen))
