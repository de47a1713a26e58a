"""A loaded model is not the file any more: what is mapped is copied, tensor by tensor.

safetensors, and `transformers` with it, maps files: a float32 weight is then the file itself. Overwritten in
place, the model changes; cut short, the process dies of SIGBUS.
Method. Each tensor that lies in a mapped part of memory is copied, and its pages are let go at once, so that
the peak is that of the model and its largest tensor.
Cost: one copy of what was stored in the type it is used in; nothing where types differ.
Limits: where the system does not tell what is mapped, all tensors are copied.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from compress.host.mapped import drop_pages, mapped_files

_SUFFIX = ".safetensors"


def own_memory(model: Any) -> Any:
    """The model itself, none of its parameters and buffers in a mapped file; what is tied stays tied."""
    taken = mapped_files(_SUFFIX)
    if taken == []:
        return model
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for tensor in tensors.values():
        if not tensor.is_meta and _lies_in(tensor, taken):
            tensor.data = _copied(tensor.data, taken)
    return model


def own_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each in memory of its own; those given are used up."""
    taken = mapped_files(_SUFFIX)
    for name, tensor in tensors.items():
        if _lies_in(tensor, taken):
            tensors[name] = _copied(tensor, taken)
    return tensors


def _lies_in(tensor: Tensor, taken: Iterable[tuple[int, int, str]] | None) -> bool:
    if tensor.device.type != "cpu" or not tensor.numel():
        return False
    return taken is None or any(start <= tensor.data_ptr() < end for start, end, _ in taken)


def _copied(tensor: Tensor, taken: Iterable[tuple[int, int, str]] | None) -> Tensor:
    copy = tensor.clone()
    if taken is not None and tensor.is_contiguous():
        drop_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return copy
