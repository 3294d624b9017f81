"""From a rule, a mesh coordinate and a parameter's shape to regions of checkpoint tensors. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.layout import row_major_strides
from rdt_core.region import Region
from rdt_megatron.rules import Fused, Split, StackedExperts, Vocabulary, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_megatron.rules import AxisName, Match, Rule

_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """This rank's place along one mesh axis."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """This rank's place along the axes that cut parameters.

    Args:
        tp: tensor parallelism.
        etp: tensor parallelism of the experts.
        ep: expert parallelism.
    """

    tp: Axis = Axis()
    etp: Axis = Axis()
    ep: Axis = Axis()

    def along(self, name: AxisName) -> Axis:
        """The place along an axis by its name in a rule."""
        return self.tp if name == "tp" else self.etp


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Global sizes that a parameter's shape does not tell.

    Args:
        vocab: rows of the checkpoint's embedding, without Megatron's padding.
        is_tied: whether the checkpoint shares embedding and output.
        num_heads: query heads.
        num_query_groups: key and value heads.
        head_dim: of each.
        num_experts: of the whole model.
        query_latent: width of MLA's compressed query.
        key_value_latent: width of MLA's compressed key and value, with the rotary part.
    """

    vocab: int
    is_tied: bool
    num_heads: int
    num_query_groups: int
    head_dim: int
    num_experts: int = 0
    query_latent: int = 0
    key_value_latent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A region of one checkpoint tensor inside of a parameter. Equal for all layers; only names differ.

    Args:
        into: name of the tensor as the rule gives it, its numbers not filled in.
        expert: which of the rank's experts it is of, where the parameter's name does not say.
        shape: GLOBAL shape of the tensor, in elements.
        region: what the parameter holds of it.
        offset: elements from the parameter's first to the region's first.
        strides: of the region in the parameter's memory, in elements, one a dim of the tensor.
    """

    into: str
    expert: int | None = None
    shape: _Shape
    region: Region
    offset: int
    strides: _Shape


class ParameterShapeError(ValueError):
    """A parameter's shape is not what its rule gives. Raised to the exporter, which knows the rank."""


def pieces_of(rule: Rule, shape: _Shape, at: Coordinate, sizes: Sizes) -> Iterator[Piece]:
    """The regions that one rank's contiguous parameter holds, in order; none when it is all padding.

    Args:
        rule: for the parameter.
        shape: of this rank's parameter, in elements.
        at: this rank's mesh coordinate.
        sizes: of the model.

    Raises:
        ParameterShapeError: the shape does not fit the rule.
    """
    if isinstance(rule, Whole):
        yield _block(rule.into, shape, shape, 0, Axis())
    elif isinstance(rule, Split):
        yield _split(rule, shape, at, sizes)
    elif isinstance(rule, Vocabulary):
        into = rule.tied_into if sizes.is_tied and rule.tied_into else rule.into
        yield from _vocabulary(into, shape, at.tp, sizes.vocab)
    elif isinstance(rule, StackedExperts):
        yield from _stacked_experts(rule, shape, at, sizes)
    elif rule.interleave == "by_query_group":
        yield from _by_query_group(rule, shape, at.along(rule.axis), sizes)
    else:
        yield from _by_rank(rule, shape, at.along(rule.axis))


def tensor_name(piece: Piece, match: Match, at: Coordinate, sizes: Sizes) -> str:
    """The checkpoint name of a piece of the parameter that ``match`` was found for."""
    local = match.expert if piece.expert is None else piece.expert
    expert = None if local is None else at.ep.rank * _num_local_experts(at, sizes) + local
    return piece.into.format(layer=match.layer, expert=expert)


def _num_local_experts(at: Coordinate, sizes: Sizes) -> int:
    return sizes.num_experts // at.ep.size


def _block(into: str, shape: _Shape, local: _Shape, dim: int, axis: Axis) -> Piece:
    """The whole parameter as block ``axis.rank`` of the tensor's ``dim``."""
    start = tuple(axis.rank * n if d == dim else 0 for d, n in enumerate(local))
    region = Region(start, tuple(a + n for a, n in zip(start, local, strict=True)))
    return Piece(into=into, shape=shape, region=region, offset=0, strides=row_major_strides(local, 1))


def _rows(into: str, num_rows: int, local: _Shape, first_local: int, first: int, stop: int) -> Piece:
    """Rows ``first`` to ``stop`` of a tensor, which begin at row ``first_local`` of the parameter."""
    rest = local[1:]
    strides = row_major_strides(local, 1)
    return Piece(
        into=into,
        shape=(num_rows, *rest),
        region=Region((first, *(0 for _ in rest)), (stop, *rest)),
        offset=first_local * strides[0],
        strides=strides,
    )


def _split(rule: Split, local: _Shape, at: Coordinate, sizes: Sizes) -> Piece:
    if len(local) <= rule.dim:
        raise ParameterShapeError(f"it has {len(local)} dims, expected {rule.dim + 1}")
    axis, held = at.along(rule.axis), local[rule.dim]
    if rule.size is not None:
        expected: int = getattr(sizes, rule.size)
        if held == expected:
            axis = Axis()
        elif held * axis.size != expected:
            raise ParameterShapeError(
                f"dim {rule.dim} has {held} elements, expected {expected} or its part over {axis.size} ranks"
            )
    shape = tuple(n * axis.size if d == rule.dim else n for d, n in enumerate(local))
    return _block(rule.into, shape, local, rule.dim, axis)


def _vocabulary(into: str, local: _Shape, axis: Axis, vocab: int) -> Iterator[Piece]:
    if local[0] * axis.size < vocab:
        raise ParameterShapeError(
            f"{axis.size} ranks of {local[0]} rows cannot hold the checkpoint's vocabulary of {vocab}"
        )
    first = axis.rank * local[0]
    stop = min(first + local[0], vocab)
    if first < stop:
        yield _rows(into, vocab, local, 0, first, stop)


def _by_rank(rule: Fused, local: _Shape, axis: Axis) -> Iterator[Piece]:
    part, rest = divmod(local[0], len(rule.into))
    if rest:
        raise ParameterShapeError(f"{len(rule.into)} tensors cannot share {local[0]} rows evenly")
    for index, into in enumerate(rule.into):
        first = axis.rank * part
        yield _rows(into, part * axis.size, local, index * part, first, first + part)


def _by_query_group(rule: Fused, local: _Shape, axis: Axis, sizes: Sizes) -> Iterator[Piece]:
    """Cut the rank's plain run of rows by the segments that it meets.

    Holds where ranks outnumber groups as well: rows are cut before they are read as heads.

    Source: ``megatron/core/transformer/attention.py``, ``SelfAttention.get_query_key_value_tensors``.
    """
    dim, groups = sizes.head_dim, sizes.num_query_groups
    widths = (sizes.num_heads // groups * dim, dim, dim)
    if local[0] * axis.size != groups * sum(widths):
        raise ParameterShapeError(
            f"{axis.size} ranks of {local[0]} rows, expected {groups * sum(widths)} rows for "
            f"{sizes.num_heads} query heads and {groups} key and value heads of {dim}"
        )
    own_first, own_stop = axis.rank * local[0], (axis.rank + 1) * local[0]
    for group in range(own_first // sum(widths), math.ceil(own_stop / sum(widths))):
        segment = group * sum(widths)
        for into, width in zip(rule.into, widths, strict=True):
            first, stop = max(segment, own_first), min(segment + width, own_stop)
            if first < stop:
                shift = group * width - segment
                yield _rows(into, groups * width, local, first - own_first, first + shift, stop + shift)
            segment += width


def _stacked_experts(rule: StackedExperts, local: _Shape, at: Coordinate, sizes: Sizes) -> Iterator[Piece]:
    stacked, parts = rule.stacked_dim, len(rule.into)
    num_local = _num_local_experts(at, sizes)
    per_expert, rest = divmod(local[stacked], num_local or local[stacked] + 1)
    features, uneven = divmod(per_expert, parts)
    if rest or uneven or not features:
        raise ParameterShapeError(
            f"{num_local} experts of {parts} tensors cannot share {local[stacked]} features"
        )
    rows, columns = (per_expert, local[1]) if stacked == 0 else (local[0], per_expert)
    shape = [columns, rows]
    feature_dim = 1 - stacked
    shape[feature_dim] = features * at.etp.size
    start, stop = [0, 0], list(shape)
    start[feature_dim], stop[feature_dim] = features * at.etp.rank, features * (at.etp.rank + 1)
    step = features * (columns if stacked == 0 else 1)
    for expert in range(num_local):
        for index, into in enumerate(rule.into):
            yield Piece(
                into=into,
                expert=expert,
                shape=(shape[0], shape[1]),
                region=Region(tuple(start), tuple(stop)),
                offset=expert * rows * columns + index * step,
                strides=(1, columns),
            )
