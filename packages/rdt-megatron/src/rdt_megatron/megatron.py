"""The exporter for Megatron-core: every parallelism, over the parameters that the optimizer writes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rdt_core.collection import paused_collection
from rdt_core.errors import UnsupportedLayoutError
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.manifest import TensorSpec
from rdt_megatron.compat import settle_expert_bias, sync_parameters
from rdt_megatron.families import UnknownModelTypeError, find_family
from rdt_megatron.geometry import ParameterShapeError, pieces_of, tensor_name
from rdt_megatron.megatron_model import check_contiguous, coordinate_of, held_by, unwrap, wrappers_of
from rdt_megatron.model_config import field_of, find_objection, sizes_of
from rdt_megatron.places import Places, Slot
from rdt_megatron.readable import check_readable
from rdt_megatron.rules import RuleIndex
from rdt_megatron.world import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch.distributed as dist

    from rdt_megatron.geometry import Coordinate, Piece, Sizes
    from rdt_megatron.megatron_model import Held
    from rdt_megatron.rules import Family, Rule

_ALL = "the model"


def megatron_shards(
    model: nn.Module | Sequence[nn.Module],
    hf_config: object,
    *,
    family: Family | None = None,
    skip: Sequence[str] = (),
    process_group: dist.ProcessGroup | None = None,
) -> LocalShards:
    """Describe the parameters that this Megatron-core rank holds, where they lie.

    Called in every trainer rank, between steps, after the model was wrapped in DistributedDataParallel and
    the optimizer was made: the distributed optimizer moves all parameters into a buffer of its own. Nothing
    is gathered, copied or communicated. Routers with a bias are told to make its float32 memory now.

    With ``overlap_param_gather`` parameters are incomplete after ``optimizer.step()`` until the next forward.
    ``publish`` then completes them by Megatron's own call, a collective of the data-parallel group: every
    rank must publish, in the same order as its other collectives.

    Args:
        model: the list of model chunks that Megatron trains, wrapped or not; one chunk alone will do.
        hf_config: the checkpoint's ``config.json``, parsed, or a transformers config: its ``model_type``,
            ``vocab_size`` and ``tie_word_embeddings``. Sizes that it shares with Megatron's must agree.
        family: the table; by default the one that serves ``model_type``.
        skip: patterns (``"mtp.*"``) of Megatron parameters that engines do not load.
        process_group: all trainer ranks; by default the whole world.

    Raises:
        UnsupportedLayoutError: no table serves the model or one of its parameters, a setting makes memory
            differ from the checkpoint in more than layout, or a parameter is where no engine could read it.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    rank, world_size = rank_and_size(process_group)
    family = family or _family(hf_config, rank)
    exporter = _Exporter(family, hf_config, skip, rank)
    shards: list[LocalShard] = []
    sources: list[tuple[Slot, int]] = []
    with torch.no_grad(), paused_collection():
        for chunk in map(unwrap, chunks):
            settle_expert_bias(chunk)
            for held, address, found in exporter.describe(chunk):
                shards += found
                slot = Slot(held.module, held.attribute, held.tensor)
                sources += [(slot, shard.data.data_ptr() - address) for shard in found]
    return LocalShards(
        rank=rank,
        world_size=world_size,
        shards=tuple(shards),
        locate=Places(sources),
        refresh=_refresh_of(chunks),
    )


def _family(hf_config: object, rank: int) -> Family:
    try:
        return find_family(str(field_of(hf_config, "model_type")))
    except UnknownModelTypeError as error:
        remedy = "Add a table (docs/adding-a-model.md), or pass family=."
        raise UnsupportedLayoutError(_ALL, rank, str(error), remedy) from error


class _Exporter:
    """Describes chunk after chunk of one model."""

    def __init__(self, family: Family, hf_config: object, skip: Sequence[str], rank: int) -> None:
        self._family, self._hf_config, self._skip, self._rank = family, hf_config, skip, rank
        self._rules = RuleIndex(family.rules)
        self._pieces: dict[tuple[str, tuple[int, ...]], tuple[Piece, ...]] = {}

    def describe(self, chunk: Any) -> Iterator[tuple[Held, int, list[LocalShard]]]:
        """Every parameter of a bare chunk, its address, and what it holds."""
        self._check_config(chunk)
        at, sizes = coordinate_of(chunk), sizes_of(chunk.config, self._hf_config)
        device: torch.device | None = None
        for held in held_by(chunk):
            if not any(fnmatchcase(held.name, pattern) for pattern in self._skip):
                tensor = held.tensor.detach() if type(held.tensor) is nn.Parameter else held.tensor
                device = device or tensor.device
                check_readable(tensor, held.name, self._rank, device)
                check_contiguous(held.name, tensor, self._rank)
                yield held, tensor.data_ptr(), list(self._shards_of(held.name, tensor, at, sizes))

    def _check_config(self, chunk: Any) -> None:
        objection = find_objection(chunk.config, self._hf_config, self._family)
        if objection is not None:
            raise UnsupportedLayoutError(_ALL, self._rank, objection.reason, objection.remedy)
        is_tied = bool(chunk.share_embeddings_and_output_weights)
        if is_tied != bool(field_of(self._hf_config, "tie_word_embeddings")):
            raise UnsupportedLayoutError(
                _ALL,
                self._rank,
                f"share_embeddings_and_output_weights is {is_tied} in Megatron, and tie_word_embeddings is "
                f"{not is_tied} in the checkpoint's config",
                "Make them agree.",
            )

    def _shards_of(
        self, name: str, tensor: torch.Tensor, at: Coordinate, sizes: Sizes
    ) -> Iterator[LocalShard]:
        match = self._rules.find(name)
        if match is None:
            raise UnsupportedLayoutError(
                name,
                self._rank,
                f"{self._family.table} has no rule for it",
                "Add one there (docs/adding-a-model.md), or pass skip= if engines do not load it.",
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        for piece in self._pieces_of(match.rule, name, tuple(tensor.shape), at, sizes):
            yield LocalShard(
                spec=TensorSpec(tensor_name(piece, match, at, sizes), piece.shape, dtype),
                region=piece.region,
                data=tensor.as_strided(
                    piece.region.shape, piece.strides, tensor.storage_offset() + piece.offset
                ),
                owner=name,
            )

    def _pieces_of(
        self, rule: Rule, name: str, shape: tuple[int, ...], at: Coordinate, sizes: Sizes
    ) -> tuple[Piece, ...]:
        """Worked out once for all layers and experts: they differ in names only."""
        known = self._pieces.get((rule.parameter, shape))
        if known is not None:
            return known
        try:
            return self._pieces.setdefault((rule.parameter, shape), tuple(pieces_of(rule, shape, at, sizes)))
        except ParameterShapeError as error:
            raise UnsupportedLayoutError(
                name,
                self._rank,
                f"{error} (shape {shape}, by {self._family.table})",
                "Use the family of the model that is trained, or correct the rule.",
            ) from error


def _refresh_of(chunks: Sequence[nn.Module]) -> Callable[[], None] | None:
    """What ``publish`` must run so that parameters are complete; None when they are after every step."""
    overlapped = [
        wrapper
        for chunk in chunks
        for wrapper in wrappers_of(chunk)
        if getattr(getattr(wrapper, "ddp_config", None), "overlap_param_gather", False)
    ]
    if not overlapped:
        return None

    def refresh() -> None:
        for wrapper in overlapped:
            sync_parameters(wrapper)

    return refresh
