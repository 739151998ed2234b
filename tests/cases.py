"""Inputs: shapes, memory layouts and dims, each with the reason why it is tested."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

SHAPES: dict[str, tuple[int, ...]] = {
    "round": (32, 16, 8),  # a multiple of every vector width in every dim
    "odd": (7, 5, 3),  # a multiple of nothing
    "matrix": (33, 17),  # Linear: only a first and a last dim, one over a vector width
    "vector": (9,),  # first and last dim at once: one element per norm
    "single": (1, 1, 1),  # every dim has size 1, so every stride is arbitrary
    "one_row": (1, 67),  # dim 0 is the whole tensor
    "one_column": (67, 1),  # dim 0 has rows of one element, dim 1 one long strided row
    "conv2d": (8, 6, 3, 3),  # the kernel dims are shorter than a vector
    "conv3d": (4, 3, 2, 3, 2),  # two middle dims on either side of the normed one
    "many_rows": (1500, 2),  # more rows than one chunk of short rows is likely to hold
    "long_rows": (2, 9001),  # rows longer than a cache-sized chunk, odd tail
}

EMPTY_SHAPES: dict[str, tuple[int, ...]] = {
    "no_rows": (0, 3),  # torch._weight_norm dies of a division by zero here
    "no_columns": (3, 0),  # three norms over nothing
    "no_inner": (2, 3, 0),  # the empty dim is neither first nor the normed one
    "no_middle": (2, 0, 3),
    "nothing": (0,),
}

LAYOUTS: dict[str, tuple[int, ...]] = {
    "transposed": (7, 5, 3),  # dense, memory order reversed: first and last dim swap roles
    "rotated": (6, 4, 5),  # dense, the first dim lies in between the others
    "channels_last": (8, 6, 3, 3),  # dense, the usual conv2d order
    "channels_last_3d": (4, 3, 2, 3, 2),  # dense, the usual conv3d order
    "unaligned": (8, 16),  # dense, starts one element after an aligned address
    "gaps": (7, 5, 3),  # every other element along the last dim
    "cut": (6, 5, 8),  # a window: gaps between rows, inner dim dense
    "expanded": (6, 5, 4),  # stride 0 along the first dim
}
"""Layout name -> the shape it is tested with."""

DENSE_LAYOUTS = ["transposed", "rotated", "channels_last", "channels_last_3d", "unaligned"]


COUNTED_FROM_THE_END = ("odd", "no_inner")
"""Shapes that are tested with negative dims, too: all that is done with those is done by a check at
the door. -1 is the whole tensor."""


def shape_dims(shapes: dict[str, tuple[int, ...]]) -> list:
    """``(shape, dim)`` parameters for every dim of every shape, but for the 9,001 columns of the
    long rows: Triton's interpreter takes seconds for them, and tests of each kind of kernels have
    such columns of their own."""
    return [
        pytest.param(shape, dim, id=f"{name}-{dim}")
        for name, shape in shapes.items()
        for dim in (
            None,
            *range(-len(shape) if name in COUNTED_FROM_THE_END else 0, len(shape)),
        )
        if (name, dim) != ("long_rows", 1)
    ]


def layout_dims(names: list[str] | None = None) -> list:
    """``(layout, dim)`` parameters: the non-negative dims and None."""
    return [
        pytest.param(name, dim, id=f"{name}-{dim}")
        for name in names or LAYOUTS
        for dim in (None, *range(len(LAYOUTS[name])))
    ]


F32, F64 = torch.float32, torch.float64
ENDS = {
    "subnormal rows under a bound": (F32, 1e-42, 1, 1e-10, 1e-20),
    "g over norm is subnormal": (F32, 1e10, 1e-30, 1e10, 0),
    "g over norm overflows": (F32, 1e-30, 1e10, 1e-20, 0),
    "subnormal g": (F32, 1, 1e-40, 1e20, 0),
    "no g": (F32, 1e-30, 0, 1e10, 0),
    "zeros, a bound below the range": (F32, 0, 1, 1e-20, 1e-50),
    "zeros, a bound far below": (F32, 0, 1e-20, 1e-30, 1e-70),
    "zeros, a bound far below all": (F32, 0, 1, 0, 1e-300),
    "zeros, a subnormal bound": (F32, 0, 1e-20, 1e-10, 1e-40),
    "subnormal rows and bound": (F32, 1e-42, 1e-3, 1e-10, 1e-40),
    "subnormal rows under a bound, float64": (F64, 1e-310, 1, 1e-10, 1),
    "g over norm is subnormal, float64": (F64, 1e150, 1e-170, 1, 0),
    "g over norm underflows, float64": (F64, 1e200, 1e-200, 1e200, 0),
    "g over norm overflows, float64": (F64, 1e-200, 1e200, 1e-200, 0),
    "zeros, a subnormal bound, float64": (F64, 0, 1e-10, 1e-10, 1e-320),
    "subnormal rows and bound, float64": (F64, 1e-312, 1e-10, 1e-10, 1e-310),
}
"""Ends of the float range: a dtype, the sizes of v, g and grad_w, and eps."""


def rounded_past_eps(
    shape: Sequence[int], dtype: torch.dtype, side: str
) -> tuple[torch.Tensor, float]:
    """A v of half type, and an eps between its norm and what the norm is when that is rounded:
    "below" eps, or "above" it."""
    while True:
        v = randn(shape, dtype)
        norm = v.double().norm()
        rounded = norm.to(dtype).double()
        if abs(rounded - norm) > 0.2 * torch.finfo(dtype).eps * norm and (rounded < norm) == (
            side == "below"
        ):
            return v, float((norm + rounded) / 2)


def mixed_dtypes(out_dtypes: list[torch.dtype | None]) -> list:
    """``(v_dtype, g_dtype, out_dtype, dim)`` parameters: all three dtypes with each other, each two
    of them and of a dtype and a dim, of three-dimensional tensors."""
    every_dim = [0, 1, 2, None]
    return [
        pytest.param(v, g, out, dim, id=f"{dim}-{v}-{g}-{out}")
        for a, v in enumerate(DTYPES)
        for b, g in enumerate(DTYPES)
        for c, out in enumerate(out_dtypes)
        for dim in [every_dim[(a + b + c) % 4]]
    ]


def g_shape(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """The shape of g, by the words of torch's documentation."""
    if dim is None or dim == -1:
        return ()
    ones = [1] * len(shape)
    ones[dim] = shape[dim]
    return tuple(ones)


def randn(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Tensor:
    """Normal random numbers in a memory layout of :data:`LAYOUTS`."""
    if layout == "expanded":
        return torch.randn(1, *shape[1:], dtype=torch.float64).to(dtype).expand(shape)
    return empty(shape, dtype, layout).copy_(torch.randn(shape, dtype=torch.float64))


def randn_g(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A g for v of ``shape``, of either sign."""
    return randn(g_shape(shape, dim), dtype)


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    match layout:
        case "contiguous":
            return torch.empty(shape, dtype=dtype)
        case "transposed":
            return torch.empty(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
        case "rotated":
            return torch.empty(shape[1], shape[0], *shape[2:], dtype=dtype).transpose(0, 1)
        case "channels_last":
            return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        case "channels_last_3d":
            return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last_3d)
        case "unaligned":
            return torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
        case "gaps":
            return torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
        case "cut":
            wide = torch.empty(shape[0] + 2, *shape[1:-1], shape[-1] + 3, dtype=dtype)
            return wide[1:-1, ..., 1:-2]
    raise ValueError(f"layout: expected one of {[*LAYOUTS]}, got {layout!r}")
