"""Tiny models whose loaders do, one each, what loaders of real engines do; and a replay of recordings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from rdt_core.describe import dtype_name, typed_view
from rdt_core.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rdt_core.recording import Recording

    Tensors = Mapping[str, torch.Tensor]

PATTERN = 0x5B
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS = 8, 4, 2, 4, 6, 3


def parameter(*shape: int, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Model(nn.Module):
    """A model whose loader is a function of the model and the stream."""

    def __init__(self, load: Callable[[Model, Iterable[tuple[str, torch.Tensor]]], object]) -> None:
        super().__init__()
        self._load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        return self._load(self, weights)


def each(load_one: Callable[[Model, str, torch.Tensor], object]) -> Callable[..., object]:
    """A loader that handles one tensor after the other."""

    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            load_one(model, name, tensor)

    return load


def copy_by_name(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.get_parameter(name).data.copy_(tensor)


def storages(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every storage of a model as bytes, by each name that it has."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found = {}
    for name, tensor in named:
        flat = torch.empty(0, dtype=torch.uint8)
        storage = tensor.untyped_storage()
        found[name] = flat.set_(storage, 0, (storage.nbytes(),), (1,))
    return found


def pour(model: nn.Module) -> None:
    """Fill all of a model's memory with a byte that no loader writes."""
    for flat in storages(model).values():
        flat.fill_(PATTERN)


def picture(model: nn.Module) -> dict[str, bytes]:
    """Every byte of every parameter and buffer."""
    return {name: bytes(flat.numpy().tobytes()) for name, flat in storages(model).items()}


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()]


def replay(
    recording: Recording,
    tensors: Tensors,
    load: Callable[[list[tuple[str, torch.Tensor]]], object],
) -> None:
    """Do what a commit does, from whole checkpoint tensors: the loader's share, then fills and copies."""
    if recording.reload:
        load([(name, tensors[name].clone()) for name in tensors if name in recording.reload])
    with torch.no_grad():
        for fill in recording.fills:
            window = recording.windows[fill.window]
            typed_view(window, fill.dtype, fill.shape, fill.offset_bytes, fill.stride_bytes).fill_(fill.value)
        for shard in recording.shards:
            box = tuple(slice(*pair) for pair in zip(shard.region.start, shard.region.stop, strict=True))
            window, shape = recording.windows[shard.window], shard.region.shape
            target = typed_view(window, shard.dtype, shape, shard.offset_bytes, shard.stride_bytes)
            target.copy_(tensors[shard.tensor][box])


def randoms(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


# Loaders that a read can replay whole.


def fused_attention() -> tuple[Model, dict[str, torch.Tensor]]:
    """q, k and v as rows of one parameter, a bias, and a vocabulary padded with zeros."""
    rows = {"q": (0, 16), "k": (16, 8), "v": (24, 8)}

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        if name == "embed":
            target = model.get_parameter("embed").data
            target[: tensor.shape[0]].copy_(tensor)
            target[tensor.shape[0] :].fill_(0)
            return
        first, num_rows = rows[name[0]]
        kind = name.split(".")[1]
        model.get_parameter(kind).data.narrow(0, first, num_rows).copy_(tensor)

    model = Model(each(load_one))
    model.weight, model.bias, model.embed = parameter(32, HIDDEN), parameter(32), parameter(16, HIDDEN)
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"{letter}.weight": (num_rows, HIDDEN) for letter, (_, num_rows) in rows.items()}
    shapes |= {f"{letter}.bias": (num_rows,) for letter, (_, num_rows) in rows.items()}
    return model, randoms({**shapes, "embed": (13, HIDDEN)})


def sharded_rows_and_columns() -> tuple[Model, dict[str, torch.Tensor]]:
    """Rank 1 of 2: a column-parallel slice of rows, and a row-parallel slice of columns."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        dim = 0 if name == "up" else 1
        half = tensor.shape[dim] // 2
        model.get_parameter(name).data.copy_(tensor.narrow(dim, half, half))

    model = Model(each(load_one))
    model.up, model.down = parameter(INNER, HIDDEN), parameter(HIDDEN, INNER)
    return model, randoms({"up": (2 * INNER, HIDDEN), "down": (HIDDEN, 2 * INNER)})


def experts() -> tuple[Model, dict[str, torch.Tensor]]:
    """Experts one by one, [gate | up] in one parameter; and all experts of a layer in one tensor."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        if name == "all_down":
            for expert, part in enumerate(tensor.unbind(0)):
                model.get_parameter("w2").data[expert].copy_(part.t())
            return
        expert, which = int(name.split(".")[1]), name.split(".")[2]
        half = 0 if which == "gate" else 1
        model.get_parameter("w13").data[expert].chunk(2)[half].copy_(tensor)

    model = Model(each(load_one))
    model.w13, model.w2 = parameter(EXPERTS, 2 * INNER, HIDDEN), parameter(EXPERTS, HIDDEN, INNER)
    shapes = {f"experts.{e}.{which}": (INNER, HIDDEN) for e in range(EXPERTS) for which in ("gate", "up")}
    return model, randoms({**shapes, "all_down": (EXPERTS, INNER, HIDDEN)})


def interleaved_rows() -> tuple[Model, dict[str, torch.Tensor]]:
    """A fused checkpoint tensor whose even rows are one parameter and whose odd rows another."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.get_parameter("gate").data.copy_(tensor[::2])
        model.get_parameter("up").data.copy_(tensor[1::2])

    model = Model(each(load_one))
    model.gate, model.up = parameter(INNER, HIDDEN), parameter(INNER, HIDDEN)
    return model, randoms({"gate_up": (2 * INNER, HIDDEN)})


def tied_and_pooled() -> tuple[Model, dict[str, torch.Tensor]]:
    """Two names of one parameter, and two parameters that are views of one pool."""
    model = Model(each(copy_by_name))
    pool = torch.zeros(64, dtype=torch.bfloat16)
    model.embed = parameter(4, HIDDEN)
    model.head = model.embed
    model.left = nn.Parameter(pool[8:24].view(2, HIDDEN), requires_grad=False)
    model.right = nn.Parameter(pool[24:40].view(HIDDEN, 2).t(), requires_grad=False)
    return model, randoms({"embed": (4, HIDDEN), "left": (2, HIDDEN), "right": (2, HIDDEN)})


def widened() -> tuple[Model, dict[str, torch.Tensor]]:
    """A cast to float32 that loses nothing, and float32 rounded once into bfloat16."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.get_parameter(name).data.copy_(tensor.to(torch.float32))

    model = Model(each(load_one))
    model.scale, model.weight = parameter(5, dtype=torch.float32), parameter(3, 5)
    return model, {**randoms({"scale": (5,)}), **randoms({"weight": (3, 5)}, torch.float32)}


def joined_halves() -> tuple[Model, dict[str, torch.Tensor]]:
    """Trap 1: two checkpoint tensors joined by cat, then copied as one."""

    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        halves = dict(weights)
        model.get_parameter("fused").data.copy_(torch.cat([halves["a"], halves["b"]], dim=0))
        model.get_parameter("wide").data.copy_(torch.cat((halves["a"], halves["b"]), dim=-1))
        model.get_parameter("stacked").data.copy_(torch.stack([halves["b"], halves["a"]], 1)[:, :, 2:5])

    model = Model(load)
    model.fused, model.wide, model.stacked = parameter(8, HIDDEN), parameter(4, 16), parameter(4, 2, 3)
    return model, randoms({"a": (4, HIDDEN), "b": (4, HIDDEN)})


def zeroed_source() -> tuple[Model, dict[str, torch.Tensor]]:
    """Trap 4: the loader zeroes the checkpoint tensor, whole or in part, and then copies it."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        if name == "bias":
            tensor.zero_()
        else:
            tensor[1:3, 2:].fill_(0.5)
        model.get_parameter(name).data.copy_(tensor)

    model = Model(each(load_one))
    model.bias, model.weight = parameter(HIDDEN), parameter(4, HIDDEN)
    return model, randoms({"bias": (HIDDEN,), "weight": (4, HIDDEN)})


def permuted_reshape() -> tuple[Model, dict[str, torch.Tensor]]:
    """Trap 5: heads taken apart, permuted and flattened again, which makes a copy on the way."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        split = tensor.view(HEADS, 2, HEAD_DIM // 2, HIDDEN)
        model.get_parameter("weight").data.copy_(split.transpose(1, 2).reshape(HEADS * HEAD_DIM, HIDDEN))
        by_group = tensor.view(KV_HEADS, 2, HEAD_DIM, HIDDEN).permute(1, 0, 2, 3).contiguous()
        model.get_parameter("grouped").data.copy_(by_group.view(-1, HIDDEN)[4:12])

    model = Model(each(load_one))
    model.weight, model.grouped = parameter(HEADS * HEAD_DIM, HIDDEN), parameter(8, HIDDEN)
    return model, randoms({"weight": (HEADS * HEAD_DIM, HIDDEN)})


def moved_about() -> tuple[Model, dict[str, torch.Tensor]]:
    """Rows picked, repeated, flipped, rolled and padded."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        order = torch.tensor([3, 0, 0, 2])
        padded = nn.functional.pad(tensor, (0, 0, 0, 2))
        model.get_parameter("picked").data.copy_(tensor.index_select(0, order))
        model.get_parameter("indexed").data.copy_(tensor[order])
        model.get_parameter("repeated").data.copy_(tensor.repeat(2, 1))
        model.get_parameter("flipped").data.copy_(tensor.flip(0).roll(1, dims=1))
        model.get_parameter("padded").data.copy_(padded)
        model.get_parameter("spread").data.copy_(tensor[:, None].expand(-1, 3, -1).reshape(12, HIDDEN))

    model = Model(each(load_one))
    rows = {
        "picked": 4,
        "indexed": 4,
        "repeated": 8,
        "flipped": 4,
        "padded": 6,
        "spread": 12,
    }
    for name, num_rows in rows.items():
        model.register_parameter(name, parameter(num_rows, HIDDEN))
    return model, randoms({"weight": (4, HIDDEN)})


def assembled_scratch() -> tuple[Model, dict[str, torch.Tensor]]:
    """Parts written into new memory like a source's, which is then copied."""

    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        found = dict(weights)
        scratch = found["a"].new_zeros(8, HIDDEN)
        scratch[:3].copy_(found["a"])
        scratch[5:].copy_(found["b"])
        model.get_parameter("weight").data.copy_(scratch)

    model = Model(load)
    model.weight = parameter(8, HIDDEN)
    return model, randoms({"a": (3, HIDDEN), "b": (3, HIDDEN)})


def overwritten() -> tuple[Model, dict[str, torch.Tensor]]:
    """Zeroed before it is written, written twice in part, and zeroed in part afterwards."""

    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        found = dict(weights)
        target = model.get_parameter("weight").data
        target.zero_()
        target[:6].copy_(found["a"])
        target[4:, 1:5].copy_(found["b"])
        target[5, 3:].zero_()

    model = Model(load)
    model.weight = parameter(9, HIDDEN)
    return model, randoms({"a": (6, HIDDEN), "b": (5, 4)})


def nested_scalars() -> tuple[Model, dict[str, torch.Tensor]]:
    """A tensor of no dim, one spread over a parameter, a written buffer and an unwritten one."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target = model.get_buffer(name) if name == "table" else model.get_parameter(name).data
        target.copy_(tensor)

    model = Model(each(load_one))
    model.scale, model.spread = parameter(), parameter(3, 2)
    model.register_buffer("table", torch.zeros(4, dtype=torch.int32))
    model.register_buffer("cache", torch.zeros(4))
    return model, {**randoms({"scale": (), "spread": (1, 2)}), "table": torch.arange(4, dtype=torch.int32)}


DIRECT = [
    fused_attention, sharded_rows_and_columns, experts, interleaved_rows, tied_and_pooled, widened,
    joined_halves, zeroed_source, permuted_reshape, moved_about, assembled_scratch, overwritten,
    nested_scalars,
]  # fmt: skip


# Loaders of which some tensors must be loaded again at every version.


def incremented() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """Trap 2: a write that is neither a copy nor a fill."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target = model.get_parameter(name).data.copy_(tensor)
        if name == "norm":
            target.add_(1)

    model = Model(each(load_one))
    model.norm, model.weight = parameter(HIDDEN), parameter(2, HIDDEN)
    return model, randoms({"norm": (HIDDEN,), "weight": (2, HIDDEN)}), {"norm": "aten.add_.Tensor"}


def derived_buffer() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """A buffer computed from the parameter that was just loaded."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.get_parameter("norm").data.copy_(tensor)
        model.get_buffer("shifted").copy_(model.get_parameter("norm")).add_(1)

    model = Model(each(load_one))
    model.norm = parameter(HIDDEN)
    model.register_buffer("shifted", torch.zeros(HIDDEN))
    return model, randoms({"norm": (HIDDEN,)}), {"norm": "aten.add_.Tensor"}


def computed_decay() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """Trap 6: arithmetic on a source."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        value = -torch.exp(tensor.float()) if name == "A_log" else tensor
        model.get_parameter(name).data.copy_(value)

    model = Model(each(load_one))
    model.A_log, model.D = parameter(HIDDEN, dtype=torch.float32), parameter(HIDDEN)
    return model, randoms({"A_log": (HIDDEN,), "D": (HIDDEN,)}), {"A_log": "aten.exp.default"}


def rounded_twice() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """Precision lost on the way, which a read would keep."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.get_parameter(name).data.copy_(tensor.to(torch.bfloat16))

    model = Model(each(load_one))
    model.scale = parameter(HIDDEN, dtype=torch.float32)
    lossy = "the casts float32 -> bfloat16 -> float32"
    return model, randoms({"scale": (HIDDEN,)}, torch.float32), {"scale": lossy}


def scattered() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """An indexed write over a part of what another tensor filled: both must be loaded again."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        if name == "base":
            model.get_parameter("weight").data.copy_(tensor)
        else:
            model.get_parameter("weight").data[torch.tensor([0, 2])] = tensor

    model = Model(each(load_one))
    model.weight = parameter(4, HIDDEN)
    reload = dict.fromkeys(("base", "rows"), "aten.index_put_.default")
    return model, randoms({"base": (4, HIDDEN), "rows": (2, HIDDEN)}), reload


def joined_with_computed() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that are joined must all be loaded again when one of them must."""

    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        found = dict(weights)
        if "a" in found:
            model.get_parameter("joined").data.copy_(torch.cat([found["a"], found["b"]]))
            model.get_parameter("norm").data.copy_(found["b"][0] * 2)
        if "c" in found:
            model.get_parameter("plain").data.copy_(found["c"])

    model = Model(load)
    model.joined, model.norm, model.plain = parameter(4, HIDDEN), parameter(HIDDEN), parameter(2, HIDDEN)
    tensors = randoms(dict.fromkeys(("a", "b", "c"), (2, HIDDEN)))
    return model, tensors, dict.fromkeys(("a", "b"), "aten.mul.Tensor")


def overwritten_by_computed() -> tuple[Model, dict[str, torch.Tensor], dict[str, str]]:
    """A computed tensor and a moved one share a parameter, each on top of the other somewhere."""

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target = model.get_parameter("weight").data
        if name == "first":
            target[:4].copy_(tensor)
        elif name == "second":
            target[2:6].copy_(tensor * 3)
        else:
            target[5:].copy_(tensor)

    model = Model(each(load_one))
    model.weight = parameter(8, HIDDEN)
    shapes = {"first": (4, HIDDEN), "second": (4, HIDDEN), "third": (3, HIDDEN)}
    return model, randoms(shapes), {"second": "aten.mul.Tensor"}


RELOADING = [
    incremented, derived_buffer, computed_decay, rounded_twice, scattered, joined_with_computed,
    overwritten_by_computed,
]  # fmt: skip


def case_name(make: Callable[..., object]) -> str:
    return re.sub("_", " ", make.__name__)
