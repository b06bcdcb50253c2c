"""What makes a forward pass another path: calls, settings, rows moved between examples, gates.

A look-up moves rows. Where the layout of what it looks rows up in is known, only what it moves
*between* the examples is part of the path: other positions of the same example do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ola_augment.alignment.calls.arguments import PLAIN, Function, named, spelled, tensors_in
from ola_augment.alignment.calls.layout import Layout


def setting(value: Any) -> Any:
    """What of an argument makes a call another call."""
    kind = type(value)
    if kind in PLAIN:
        # Rates change from step to step; switched off or on they make another function.
        return 0.5 if kind is float and value not in (0.0, 1.0) else value
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(map(setting, value))
    if isinstance(value, slice):
        return setting((value.start, value.stop, value.step))
    return value if isinstance(value, (int, str)) else kind


class LookUp(NamedTuple):
    """A call that reads or writes rows by number.

    Attributes:
        path: number of the call.
        subjects: the data whose rows move, each with its number among the arguments.
        dim: along which rows are numbered; None: the index has a part for each dimension.
        index: a tensor of whole numbers, or what stands in square brackets.
        version: of the index.
    """

    path: int
    subjects: tuple[tuple[int, torch.Size], ...]
    dim: int | None
    index: Any
    version: Any

    def moves(self, layouts: Mapping[tuple[int, int], Any]) -> Any:
        """What it moves between examples, by the layouts of its subjects, to compare."""
        if self.version != _version(self.index):  # written since: never the same
            return object()
        found = []
        for number, shape in self.subjects:
            layout = layouts.get((self.path, -1 - number))
            if not isinstance(layout, Layout):
                found.append((self.dim, _content(self.index)))
            elif self.dim is None:
                found.append(_between(self.index, shape, layout))
            elif self.dim % len(shape) == layout.dim:
                found.append(_content(_owners(self.index, layout)))
        return tuple(found)


def look_up(
    path: int, function: Function, args: Any, kwargs: Any, is_data: Callable[[Any], bool]
) -> LookUp | None:
    """What a call looks up in data; None where it looks nothing up."""
    names = _LOOK_UPS.get(spelled(function))
    if names is None:
        return None
    bound = named(function, args, kwargs)
    order = {id(value): number for number, value in enumerate(bound.values())}
    subject_names, index_name = names
    if spelled(function) == "embedding" and "indices" not in bound:  # torch.nn.functional's
        index_name = "input" if "input" in bound else "self"
    elif index_name not in bound:
        return None
    data: list[Any] = [v for name in subject_names if is_data(v := bound.get(name))]
    if not data:  # data choose rows of something else
        return None
    subjects = tuple((order[id(value)], value.shape) for value in data)
    index = bound[index_name]
    if index_name == "start":
        stop = bound.get("length", bound.get("end"))
        index, dim = (index, stop), int(bound.get("dim", 0))
    elif spelled(function) in _BY_PARTS:
        dim = None
        index = tuple(index) if index_name == "indices" else index
        if data[0] is not bound[subject_names[0]]:  # what is written to has no examples yet
            subjects = ((_UNKNOWN, data[0].shape),)
    else:
        dim = bound.get("dim", 0)
        if dim is None or spelled(function) in ("take", "put"):
            index = _unravelled(index, subjects[0][1])
            dim = None
    return LookUp(path, subjects, dim, index, _version(index))


_UNKNOWN = -(2**20)
#: Functions whose index has a part for each dimension.
_BY_PARTS = {"__getitem__", "__setitem__", "index_put", "index"}
# Where indices move rows: name -> what they are rows of, and the name of the index.
_LOOK_UPS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("__getitem__",), (("0",), "1")),
    **dict.fromkeys(("__setitem__",), (("0", "2"), "1")),
    **dict.fromkeys(("index", "index_put"), (("self", "values"), "indices")),
    **dict.fromkeys(
        ("index_select", "gather", "take", "index_fill", "select"), (("self",), "index")
    ),
    **dict.fromkeys(
        ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce"),
        (("self", "src", "source", "value"), "index"),
    ),
    "put": (("self", "source"), "index"),
    "take_along_dim": (("self",), "indices"),
    "embedding": (("weight",), "indices"),
    "narrow": (("self",), "start"),
}  # fmt: skip


def kinds(index: Any) -> Any:
    """What of an index makes another call of a look-up: what its parts are, not their numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(
        (part.dim(), part.dtype == torch.bool) if isinstance(part, Tensor) else type(part)
        for part in parts
    )


def _version(index: Any) -> Any:
    return [tensor._version for tensor in tensors_in((index,))]


def _content(index: Any) -> Any:
    """What whole numbers an index holds."""
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.is_complex():
            return None
        return index.shape, index.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(index, (list, tuple)):
        return tuple(map(_content, index))
    return setting(index) if not hasattr(index, "tobytes") else (index.shape, index.tobytes())


def _owners(index: Any, layout: Layout) -> Any:
    """Of row numbers along the examples' dimension: whose rows they are."""
    if isinstance(index, int):
        index = index + layout.outer * layout.batch * layout.inner if index < 0 else index
        return index // layout.inner % layout.batch
    if not isinstance(index, Tensor):
        return index
    rows = torch.where(index < 0, index + layout.outer * layout.batch * layout.inner, index)
    return rows.div(layout.inner, rounding_mode="floor") % layout.batch


def _unravelled(index: Any, shape: torch.Size) -> Any:
    """Numbers of elements as an index with a part for each dimension."""
    return tuple(torch.unravel_index(index, shape)) if isinstance(index, Tensor) else index


def _between(index: Any, shape: torch.Size, layout: Layout) -> Any:
    """Of an index with a part for each dimension: the part along that of the examples."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(_as_tensor(part) for part in parts)
    taken = sum(map(_dimensions, parts))
    dim = 0
    for part in parts:
        width = len(shape) - taken if part is Ellipsis else _dimensions(part)
        if dim <= layout.dim < dim + width:
            if part is Ellipsis or part == slice(None) if not isinstance(part, Tensor) else False:
                return None
            if isinstance(part, Tensor) and part.dtype == torch.bool:
                part = part.nonzero()[:, layout.dim - dim]
            if isinstance(part, slice):
                return setting(part)
            return _content(_owners(part, layout))
        dim += width
    return None


def _as_tensor(part: Any) -> Any:
    if isinstance(part, (list, range)) or hasattr(part, "tobytes"):
        part = [*part] if isinstance(part, range) else part
        return torch.as_tensor(part, device="cpu")  # whatever the default device is
    return part


def _dimensions(part: Any) -> int:
    """How many dimensions a part of an index takes up."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def gates(
    function: Function, args: Any, kwargs: Any, batch: int, is_node: Callable[[Tensor], bool]
) -> Iterator[Tensor]:
    """Whether a call that reads data lets through what it may shut off, or mixes rows by a matrix.

    A factor of zero, a mask, or a matrix: opened it makes another path.
    """
    name = spelled(function)
    if name in _FACTORS:
        for tensor in tensors_in((*args, *kwargs.values())):
            if not is_node(tensor):
                yield from _open(tensor.detach(), batch)
    elif name in _PRODUCTS:
        mask = "attn_mask" if name == "scaled_dot_product_attention" else None
        bound = named(function, args, kwargs) if mask else {}
        for tensor in tensors_in([bound.get(mask)] if mask else (*args, *kwargs.values())):
            if not tensor.requires_grad:
                yield from _crosses(tensor, batch, mask is not None)


_FACTORS = {
    "mul", "multiply", "__mul__", "__rmul__", "__imul__", "where", "lerp", "addcmul", "masked_fill",
    "masked_scatter", "masked_select",
}  # fmt: skip
_PRODUCTS = {
    "matmul", "mm", "bmm", "einsum", "__matmul__", "__rmatmul__", "addmm", "baddbmm", "addbmm",
    "linear", "tensordot", "scaled_dot_product_attention", "chain_matmul", "multi_dot",
}  # fmt: skip

#: Of so many factors it is asked whether all are zero.
_FEW = 1024


def _open(factor: Tensor, batch: int) -> Iterator[Tensor]:
    """Of a mask, whether some and whether all is let through; of a few factors, whether any is."""
    if factor.dtype == torch.bool:
        yield factor.any()
        yield factor.all()
        yield from _crosses(factor, batch)
        yield from _crosses(factor.logical_not(), batch)
    elif factor.numel() <= _FEW and not factor.is_complex():
        yield factor.any()


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _crosses(matrix: Tensor, batch: int, added: bool = False) -> list[Tensor]:
    """Of square matrices that may be the batch's size: whether they join rows, near or far.

    Args:
        matrix: (..., N, N), or anything else, of which nothing is said.
        batch: number of examples.
        added: to scores, in which a large negative number shuts off.
    """
    if batch == 1 or matrix.dim() < 2 or matrix.shape[-2] != matrix.shape[-1]:
        return []
    size = matrix.shape[-1]
    if size % batch:
        return []
    version = None if matrix.is_inference() else (matrix._version, batch, added)
    known, found = _KNOWN.get(matrix, (None, [])) if version else (None, [])  # type: ignore[no-untyped-call]
    joined: list[Tensor] = found
    if version is None or known != version:
        entries = matrix.detach() if matrix.dtype == torch.bool else matrix.detach() != 0
        if added and matrix.dtype != torch.bool:
            entries = matrix.detach() > -1e4
        entries = entries.reshape(-1, size, size).any(0)
        rows = torch.arange(size, device=matrix.device)
        owners = (rows, rows // (size // batch), rows % batch)
        joined = [(entries & (one.unsqueeze(0) != one.unsqueeze(1))).any() for one in owners]
        if version:
            _KNOWN[matrix] = version, joined
    return joined
