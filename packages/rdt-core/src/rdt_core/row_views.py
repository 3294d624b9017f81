"""Live views of rows of bytes: what transports are given on either side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdt_core.row_blocks import slice_rows

if TYPE_CHECKING:
    import torch

    from rdt_core.row_blocks import Rows


def view_rows(flat: torch.Tensor, rows: Rows) -> torch.Tensor:
    """A uint8 view of rows of a flat tensor: one-dimensional for one row, else (rows, bytes of a row)."""
    if rows.num_rows == 1:
        return flat[rows.offset : rows.end]
    shape, strides = (rows.num_rows, rows.row_nbytes), (rows.pitch, 1)
    return flat.as_strided(shape, strides, flat.storage_offset() + rows.offset)


def cut_view(view: torch.Tensor, first: int, last: int) -> list[torch.Tensor]:
    """Bytes number ``first`` up to ``last`` of a view of :func:`view_rows`, counted along its rows."""
    if view.dim() == 1:
        return [view[first:last]]
    return [
        view[part.row, part.at : part.at + part.nbytes]
        if part.num_rows == 1
        else view[part.row : part.row + part.num_rows]
        for part in slice_rows(view.shape[1], first, last)
    ]
