"""Lets Megatron-core, which names CUDA in many places, run on a CPU. For tests; changes this whole process.

What it replaces is either a device that does not exist here or a part that needs a CUDA kernel. The layout of
parameters, the collectives and the optimizers are Megatron's own.
"""

from __future__ import annotations

import contextlib
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _OnCpu(TorchFunctionMode):
    """Sends every tensor that is asked for on CUDA to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to:
            args = tuple(_CPU if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            # Megatron's optimizers sort parameters by the name of a CUDA type.
            return result.replace("torch.", "torch.cuda.")
        return result


class _Stream:
    """Work on a CPU is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name in {"record", "wait", "synchronize", "wait_stream", "wait_event", "record_event"}:
            return lambda *_: self
        raise AttributeError(name)


def install() -> None:
    """Replace what needs CUDA. Called once in each rank, before Megatron is imported."""
    torch._dynamo.config.disable = True  # compiling for a CPU takes longer than all that is run here
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *_: None
    cuda.Stream = cuda.Event = cuda.stream = cuda.current_stream = cuda.default_stream = _Stream
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda *_: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_: self
    mode: Any = _OnCpu()
    mode.__enter__()
    _accept_tensors_as_split_sizes()
    _accept_uneven_parts()
    _patch_megatron()


def _accept_tensors_as_split_sizes() -> None:
    """Megatron turns split sizes into lists only when they are on a GPU."""
    original = dist.all_to_all_single
    distributed: Any = dist

    def listed(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    def all_to_all_single(
        output: Any, source: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any
    ) -> Any:
        return original(output, source, listed(output_split_sizes), listed(input_split_sizes), **rest)

    distributed.all_to_all_single = all_to_all_single


def _accept_uneven_parts() -> None:
    """NCCL gathers and scatters parts of different lengths; gloo wants equal ones."""
    distributed: Any = dist
    gather_even = dist.all_gather

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any = None, **rest: Any) -> Any:
        longest = max(len(part) for part in parts)
        if all(len(part) == longest for part in parts):
            return gather_even(parts, own, group, **rest)
        padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
        gathered = [torch.empty_like(padded) for _ in parts]
        gather_even(gathered, padded, group)
        for part, found in zip(parts, gathered, strict=True):
            part.copy_(found[: len(part)])
        return None

    def reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], group: Any = None, **_: Any) -> None:
        summed = torch.cat(parts)
        dist.all_reduce(summed, group=group)
        lengths = [len(part) for part in parts]
        own.copy_(torch.split(summed, lengths)[dist.get_rank(group)])

    distributed.all_gather, distributed.reduce_scatter = all_gather, reduce_scatter


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import experts, moe_utils

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = type("NoTransformerEngine", (), {})  # asked for by isinstance
    CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 names it without Transformer Engine and would fail
    if hasattr(experts, "GroupedMLP"):
        _replace_grouped_gemm(experts)


def _replace_grouped_gemm(experts: Any) -> None:
    """The matrix product of the stacked experts, expert by expert; the kernel for it takes bfloat16 only."""
    from types import SimpleNamespace

    def multiply(x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor, *, trans_b: bool) -> torch.Tensor:
        del trans_b  # always False here
        parts = torch.split(x, counts.tolist())
        return torch.cat([part @ w[index] for index, part in enumerate(parts)])

    original = experts.GroupedMLP.forward

    def forward(self: Any, *args: Any) -> Any:
        before, self.config.bf16 = self.config.bf16, True
        try:
            return original(self, *args)
        finally:
            self.config.bf16 = before

    experts.GroupedMLP.forward = forward
    experts.gg = SimpleNamespace(
        ops=SimpleNamespace(gmm=multiply), assert_grouped_gemm_is_available=lambda: None
    )
