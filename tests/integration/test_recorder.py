"""A recording, replayed, must give every byte that the loader itself gives, and must touch nothing before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from rdt_core.errors import (
    ModelMismatchError,
    UncoveredParameterError,
    UnsupportedLoaderError,
    UnusedTensorError,
)
from rdt_core.manifest import TensorSpec
from rdt_core.recorder import record_loader
from tests.integration.loader_models import (
    DIRECT,
    HIDDEN,
    RELOADING,
    Model,
    case_name,
    copy_by_name,
    each,
    parameter,
    picture,
    pour,
    randoms,
    specs_of,
)
from tests.integration.recorded import record_and_compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Made = tuple[Model, dict[str, torch.Tensor]]


@pytest.mark.parametrize("make", DIRECT, ids=case_name)
def test_replayed_reads_give_every_byte_that_the_loader_gives(make: Callable[[], Made]) -> None:
    (model, tensors), (twin, _) = make(), make()
    assert not record_and_compare(model, twin, tensors).reload


@pytest.mark.parametrize("make", RELOADING, ids=case_name)
def test_what_reads_cannot_bring_is_named_with_the_operation(
    make: Callable[[], tuple[Model, dict[str, torch.Tensor], dict[str, str]]],
) -> None:
    (model, tensors, reload), (twin, _, _) = make(), make()
    recording = record_and_compare(model, twin, tensors)
    assert recording.reload == reload
    assert not {shard.tensor for shard in recording.shards} & set(reload)


@pytest.mark.parametrize("make", DIRECT, ids=case_name)
def test_loaders_under_inference_mode_are_seen_too(make: Callable[[], Made]) -> None:
    with torch.inference_mode():
        (model, tensors), (twin, _) = make(), make()
        assert not record_and_compare(model, twin, tensors).reload


def one_parameter(load_one: Callable[[Model, str, torch.Tensor], object]) -> Model:
    model = Model(each(load_one))
    model.weight = parameter(2, HIDDEN)
    return model


WEIGHT = [TensorSpec("weight", (2, HIDDEN), "bfloat16")]


def target_of(model: Model) -> torch.Tensor:
    return model.get_parameter("weight").data


VALUE_READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda t: t[0, 0].item(),
    "bool": lambda t: bool(t[0, 0]),
    "equal": lambda t: torch.equal(t, t.clone()),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.float().numpy(),
    "nonzero": lambda t: t.nonzero(),
    "float": lambda t: float(t.sum()),
    "masked": lambda t: t[t > 0],
    "unique": torch.unique,
}


@pytest.mark.parametrize("read", VALUE_READS.values(), ids=VALUE_READS)
def test_a_loader_that_reads_values_is_refused_by_tensor_and_operation(
    read: Callable[[torch.Tensor], object],
) -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        read(tensor)
        target_of(model).copy_(tensor)

    model = one_parameter(load_one)
    before = picture(model)
    with pytest.raises(UnsupportedLoaderError, match="weight") as caught:
        record_loader(model, WEIGHT)
    assert caught.value.tensor == "weight"
    assert picture(model) == before


def test_a_refusal_that_the_loader_swallows_is_raised_all_the_same() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        try:
            tensor[0, 0].item()
        except ModelMismatchError:
            target_of(model).copy_(tensor)

    with pytest.raises(UnsupportedLoaderError, match="_local_scalar_dense"):
        record_loader(one_parameter(load_one), WEIGHT)


def test_a_refused_shape_names_the_tensor_and_what_the_loader_said() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).zero_()
        if tensor.shape != target_of(model).shape:
            raise ValueError("the shard is too small")

    model = one_parameter(load_one)
    before = picture(model)
    with pytest.raises(ModelMismatchError, match="'weight': ValueError: the shard is too small"):
        record_loader(model, [TensorSpec("weight", (1, 3), "bfloat16")])
    assert picture(model) == before


def test_a_copy_of_the_wrong_shape_is_a_mismatch() -> None:
    model = one_parameter(lambda model, _, tensor: target_of(model).copy_(tensor))
    with pytest.raises(ModelMismatchError, match="'weight': RuntimeError"):
        record_loader(model, [TensorSpec("weight", (3, HIDDEN), "bfloat16")])


def test_an_unknown_name_is_a_mismatch_that_names_it() -> None:
    model = one_parameter(lambda model, name, tensor: {"weight": target_of(model)}[name].copy_(tensor))
    with pytest.raises(ModelMismatchError, match="'other': KeyError"):
        record_loader(model, [*WEIGHT, TensorSpec("other", (1,), "bfloat16")])


def test_a_tensor_that_the_loader_drops_is_named() -> None:
    model = one_parameter(lambda model, name, t: target_of(model).copy_(t) if name == "weight" else None)
    specs = [*WEIGHT, TensorSpec("extra.bias", (4,), "bfloat16")]
    with pytest.raises(UnusedTensorError, match=r"extra\.bias"):
        record_loader(model, specs)
    recording = record_loader(model, specs, skippable=lambda name: name == "extra.bias")
    assert recording.skipped == {"extra.bias"}


def test_rotary_tables_may_be_dropped() -> None:
    model = one_parameter(lambda model, name, t: target_of(model).copy_(t) if name == "weight" else None)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert record_loader(model, [*WEIGHT, TensorSpec(table, (4,), "float32")]).skipped == {table}


def test_a_parameter_that_no_tensor_fills_is_named() -> None:
    model = one_parameter(lambda model, _, tensor: target_of(model).copy_(tensor))
    model.forgotten = parameter(3)
    with pytest.raises(UncoveredParameterError, match="forgotten") as caught:
        record_loader(model, WEIGHT)
    assert caught.value.parameters == ("forgotten",)


def test_a_hole_as_large_as_an_overlap_is_found() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).view(-1)[:8].copy_(tensor.view(-1)[:8])
        target_of(model).view(-1)[7:15].copy_(tensor.view(-1)[8:])

    with pytest.raises(UncoveredParameterError, match="weight"):
        record_loader(one_parameter(load_one), WEIGHT)


def test_a_hole_in_a_strided_write_is_found() -> None:
    with pytest.raises(UncoveredParameterError, match="weight"):
        record_loader(one_parameter(lambda model, _, t: target_of(model)[:, ::2].copy_(t[:, :4])), WEIGHT)


def test_a_buffer_that_is_filled_in_part_is_named() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).copy_(tensor)
        model.get_buffer("table")[:2].copy_(tensor[0, :2])

    model = one_parameter(load_one)
    model.register_buffer("table", torch.zeros(3))
    with pytest.raises(UncoveredParameterError, match="table"):
        record_loader(model, WEIGHT)


def test_a_write_into_memory_that_is_no_parameters_is_refused() -> None:
    side = torch.zeros(2, HIDDEN)

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        side.copy_(tensor)
        target_of(model).copy_(side)

    with pytest.raises(UnsupportedLoaderError, match="memory that is no parameter's"):
        record_loader(one_parameter(load_one), WEIGHT)


def test_a_write_over_an_alias_of_a_parameter_is_refused() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        array = target_of(model).view(torch.int16).numpy()
        torch.from_numpy(array[1:]).zero_()

    model = one_parameter(load_one)
    pour(model)
    before = picture(model)
    with pytest.raises(UnsupportedLoaderError, match="overlaps a parameter"):
        record_loader(model, WEIGHT)
    assert picture(model) == before


def test_memory_that_was_never_written_is_not_taken_for_a_tensor() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        scratch = torch.empty_like(tensor)
        scratch[:1].copy_(tensor[:1])
        target_of(model).copy_(scratch)

    with pytest.raises(UnsupportedLoaderError, match="did not load"):
        record_loader(one_parameter(load_one), WEIGHT)


def test_a_parameter_that_accumulates_is_refused() -> None:
    with pytest.raises(UnsupportedLoaderError, match=r"aten\.add_\.Tensor on a parameter that it did not"):
        record_loader(one_parameter(lambda model, _, t: target_of(model).add_(t)), WEIGHT)


def rebind_data(model: Model, tensor: torch.Tensor) -> None:
    model.get_parameter("weight").data = tensor


def rebind_data_to_own_memory(model: Model, tensor: torch.Tensor) -> None:
    target_of(model).copy_(tensor)
    model.get_parameter("weight").data = target_of(model).clone()


def rebind_geometry(model: Model, tensor: torch.Tensor) -> None:
    target_of(model).copy_(tensor)
    model.get_parameter("weight").data = target_of(model).view(-1)


def replace_parameter(model: Model, tensor: torch.Tensor) -> None:
    target_of(model).copy_(tensor)
    model.weight = nn.Parameter(tensor, requires_grad=False)


def remove_parameter(model: Model, tensor: torch.Tensor) -> None:
    target_of(model).copy_(tensor)
    del model.weight


def add_buffer(model: Model, tensor: torch.Tensor) -> None:
    target_of(model).copy_(tensor)
    model.register_buffer("new", tensor)


def set_storage(model: Model, tensor: torch.Tensor) -> None:
    target_of(model).copy_(tensor)
    torch.ops.aten.set_.source_Tensor(target_of(model), tensor)


@pytest.mark.parametrize(
    "exchange",
    [
        rebind_data, rebind_data_to_own_memory, rebind_geometry, replace_parameter, remove_parameter,
        add_buffer, set_storage,
    ],
    ids=case_name,
)  # fmt: skip
def test_a_loader_that_exchanges_memory_is_refused_and_undone(
    exchange: Callable[[Model, torch.Tensor], None],
) -> None:
    model = one_parameter(lambda model, _, tensor: exchange(model, tensor))
    pour(model)
    before, held, address = picture(model), model.weight, target_of(model).data_ptr()
    with pytest.raises(ModelMismatchError):
        record_loader(model, WEIGHT)
    assert picture(model) == before
    assert model.weight is held
    assert target_of(model).data_ptr() == address
    assert not list(model.buffers())


def test_what_the_loader_derives_into_plain_attributes_is_left_as_it_was() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).copy_(tensor)
        model.kept.copy_(target_of(model).t().contiguous())  # type: ignore[operator]  # a tensor
        model.rebound = target_of(model) * 2
        model.stashed = tensor

    model = one_parameter(load_one)
    model.kept, model.rebound = torch.full((HIDDEN, 2), 5.0), torch.full((2,), 6.0)
    kept, rebound = model.kept, model.rebound
    assert not record_loader(model, WEIGHT).reload
    assert model.kept is kept
    assert bool((kept == 5).all())
    assert model.rebound is rebound
    assert not hasattr(model, "stashed")


def test_what_was_derived_into_a_plain_attribute_taints_what_is_copied_from_it() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).copy_(tensor)
        model.scratch.copy_(target_of(model))  # type: ignore[operator]  # a tensor
        model.scratch.mul_(2)  # type: ignore[operator]  # a tensor
        model.get_parameter("twofold").data.copy_(model.scratch)  # type: ignore[arg-type]  # a tensor

    model, twin = one_parameter(load_one), one_parameter(load_one)
    for one in (model, twin):
        one.twofold, one.scratch = parameter(2, HIDDEN), torch.zeros(2, HIDDEN)
    recording = record_and_compare(model, twin, randoms({"weight": (2, HIDDEN)}))
    assert recording.reload == {"weight": "aten.mul_.Tensor"}


def test_an_indexed_write_that_accumulates_is_refused() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).index_put_((torch.tensor([0, 1]),), tensor, accumulate=True)

    with pytest.raises(UnsupportedLoaderError, match="index_put_"):
        record_loader(one_parameter(load_one), WEIGHT)


def test_constants_are_rounded_as_the_parameter_rounds_them() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).copy_(tensor)
        for kind in ("wide", "narrow"):
            model.get_parameter(kind).data.fill_(0.1)
        model.get_parameter("wide").data[1].copy_(tensor.new_full((), 0.3, dtype=torch.float32))
        model.get_parameter("wide").data[2:] = 7.7

    model, twin = one_parameter(load_one), one_parameter(load_one)
    for one in (model, twin):
        one.wide, one.narrow = parameter(4, dtype=torch.float32), parameter(3, dtype=torch.float16)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        recording = record_and_compare(model, twin, randoms({"weight": (2, HIDDEN)}))
    finally:
        torch.set_default_dtype(default)
    assert not recording.reload


def test_a_write_into_an_expanded_view_is_refused() -> None:
    with pytest.raises(UnsupportedLoaderError, match="expanded"):
        record_loader(
            one_parameter(lambda model, _, t: target_of(model)[:1].expand(2, HIDDEN).copy_(t)), WEIGHT
        )


def test_a_failure_half_way_leaves_every_byte_and_every_parameter() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).copy_(tensor)
        target_of(model).mul_(2)
        if name == "second":
            raise RuntimeError("out of luck")

    model = one_parameter(load_one)
    pour(model)
    before = picture(model)
    with pytest.raises(ModelMismatchError, match="'second': RuntimeError: out of luck"):
        record_loader(model, [*WEIGHT, TensorSpec("second", (2, HIDDEN), "bfloat16")])
    assert picture(model) == before
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_parameter_on_the_meta_device_is_refused() -> None:
    model = one_parameter(lambda model, _, tensor: target_of(model).copy_(tensor))
    model.weight = nn.Parameter(torch.empty(2, HIDDEN, device="meta"), requires_grad=False)
    with pytest.raises(UnsupportedLoaderError, match="meta"):
        record_loader(model, WEIGHT)


def test_very_ragged_selections_go_by_the_loader() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.get_parameter("weight").data.copy_(tensor[::2, ::2])

    model, twin = Model(each(load_one)), Model(each(load_one))
    model.weight, twin.weight = parameter(300, 256), parameter(300, 256)
    recording = record_and_compare(model, twin, randoms({"pairs": (600, 512)}))
    assert recording.reload == {"pairs": "a copy of more than 65536 separate pieces"}
    assert recording.shards == ()


def test_a_source_seen_as_another_element_type_goes_by_the_loader() -> None:
    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target_of(model).view(torch.int16).copy_(tensor.view(torch.int16))

    model, twin = one_parameter(load_one), one_parameter(load_one)
    recording = record_and_compare(model, twin, randoms({"weight": (2, HIDDEN)}))
    assert recording.reload == {"weight": "a view as torch.int16"}


def test_integers_that_land_as_floats_go_by_the_loader() -> None:
    model, twin = one_parameter(copy_by_name), one_parameter(copy_by_name)
    recording = record_and_compare(model, twin, {"weight": torch.arange(16).view(2, HIDDEN)})
    assert recording.reload == {"weight": "the casts int64 -> bfloat16"}


def test_whole_tensors_make_one_shard_each_in_the_first_parameters_window() -> None:
    model, tensors = DIRECT[4]()
    recording = record_loader(model, specs_of(tensors))
    assert [shard.tensor for shard in recording.shards] == ["embed", "left", "right"]
    assert set(recording.windows) == {"embed", "left"}
    assert recording.shards[2].stride_bytes == (2, 4)
    assert recording.windows["embed"].data_ptr() == model.get_parameter("head").data_ptr()


def test_the_order_of_the_stream_does_not_change_the_map() -> None:
    for make in DIRECT[:3]:
        model, tensors = make()
        backwards = dict(reversed(tensors.items()))
        forth, back = (record_loader(model, specs_of(t)).shards for t in (tensors, backwards))
        assert set(forth) == set(back)


def test_large_joined_tensors_are_not_numbered_one_by_one() -> None:
    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        halves = dict(weights)
        joined = torch.cat([halves["a"], halves["b"]], dim=1).to(torch.float32).t().contiguous()
        model.get_parameter("weight").data.copy_(joined.t())

    model = Model(load)
    model.weight = parameter(1 << 10, 1 << 11)
    shape = (1 << 10, 1 << 10)
    recording = record_loader(model, [TensorSpec(name, shape, "bfloat16") for name in ("a", "b")])
    assert [(s.tensor, s.region.shape) for s in recording.shards] == [("a", shape), ("b", shape)]
