"""Codes for matrices that are looked at one by one: what all quantizers without calibration text share."""

from collections.abc import Callable

from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import about
from compress.formats import Format, QuantizedTensor
from compress.formats.swap import put_codes, quantize_embeddings
from compress.host.progress import track
from compress.models.layers import matrix
from compress.models.stacks import block_names


def quantize_one_by_one(
    bundle: Bundle,
    context: Context,
    names: list[str],
    quantized: Callable[[Tensor], QuantizedTensor],
    embeddings: Format | None,
    what: str,
) -> Bundle:
    """A copy with codes in the place of the layers named, a block at a time where the weights are in files.

    Args:
        bundle: in float.
        context: lends a folder for blocks that are done.
        names: of linear layers inside the blocks.
        quantized: a matrix (out, in), float32, as codes; zeros to zeros where the bundle has masks.
        embeddings: of embedding and head, which are rounded to nearest; None leaves them float.
        what: the label of the progress bar.
    """
    result = bundle.clone()
    model: nn.Module = result.model
    store = result.offload(context.workdir / "parts")
    with track(len(names), what, "layers") as progress:
        for block in block_names(model):
            if store:
                store.load(block)
            for name in [name for name in names if name.startswith(f"{block}.")]:
                with about(name):
                    put_codes(model, name, quantized(matrix(model.get_submodule(name))))
                progress.advance()
            if store:
                store.release(block)
    if store:
        store.load_rest()
    if embeddings is not None:
        quantize_embeddings(model, embeddings)
    return result.evolve(shards=None, parts=tuple(store.parts) if store else ())
