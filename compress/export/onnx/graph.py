"""A small writer of ONNX graphs.

Nodes are collected in order, values get unique names, and large weights go straight to the external file
`model.onnx_data` while the graph is being described, so that no second copy of the model is held in
memory. Offsets are multiples of 4096 bytes, which lets ONNX Runtime map the file instead of reading it.
Limits: no subgraphs, no functions; opset 21 of ONNX and opset 1 of `com.microsoft`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"

OPSET = 21
_IR_VERSION = 10
_PAGE = 4096  # external tensors of a page or more start on a page, or they cannot be mapped
_CACHE_LINE = 64
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can read them

Dimensions = Sequence[int | str]
Array = NDArray[Any]


class GraphBuilder:
    """Collects a graph and writes it, with its weights beside it, into `folder`.

    A context manager: the external file is open inside it. `shared` remembers the values of weights that
    more than one node reads, by any key the caller likes, `not_before_add` the values that an Add must not
    read. A graph that comes `after` another writes to that one's external file, and shares its weights of
    the same names and bytes.
    """

    def __init__(self, folder: Path, file: str = MODEL_FILE, after: "GraphBuilder | None" = None) -> None:
        self.shared: dict[Any, str] = {}
        self.not_before_add: set[str] = set()
        self.weight_bytes = 0
        self._graph = folder / file
        self._data = (folder / DATA_FILE).open("wb" if after is None else "r+b")
        self._data.seek(0, os.SEEK_END)
        # name -> offset, of the weights that are in the file already
        self._stored: dict[str, int] = {} if after is None else {**after._stored, **after._offsets}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._sizes: list[onnx.ValueInfoProto] = []
        self._offsets: dict[str, int] = {}  # of weights in the external file
        self._count = 0

    def __enter__(self) -> "GraphBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def input(self, name: str, kind: int, shape: Dimensions, default: Array | None = None) -> str:
        """Declare an input; with a default, a caller may leave it out.

        A default is an initializer of that name, which ONNX Runtime warns of as it loads the graph: it takes
        it for a weight that an old exporter listed. ONNX has no other way to say one.
        """
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if default is not None:
            self._initializers.append(numpy_helper.from_array(default, name))
        return name

    def output(self, name: str, kind: int, shape: Dimensions) -> str:
        """Declare an output."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def sized(self, value: str, kind: int, shape: Dimensions) -> str:
        """Say the shape of a value that shape inference cannot find; equal names are equal sizes.

        As it loads a graph, ONNX Runtime looks for a buffer to use again among all those of unknown size, for
        every node: of 449 nodes it took 70 ms.
        """
        self._sizes.append(helper.make_tensor_value_info(value, kind, shape))
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Add a node; `outputs` is how many results to name, or their names.

        "" leaves an input or output out.
        """
        inputs = list(inputs)
        while inputs and not inputs[-1]:  # absent inputs at the end are not written
            inputs.pop()
        if isinstance(outputs, int):
            self._count += 1
            outputs = [f"{operator}_{self._count}.{i}" for i in range(outputs)]
        self._nodes.append(
            helper.make_node(
                operator, inputs, outputs, f"{operator}.{len(self._nodes)}", domain=domain, **attributes
            )
        )
        return tuple(outputs)

    def op(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node that has one result, and name it."""
        return self.node(operator, inputs, 1, domain, **attributes)[0]

    def rename(self, value: str, name: str) -> None:
        """Give the last node's only result, that nothing has read yet, the name of an output."""
        assert list(self._nodes[-1].output) == [value]
        self._nodes[-1].output[0] = name

    def constant(self, value: Array | float | Sequence[int]) -> str:
        """A small constant; Python integers become int64, a float becomes float32. Equal ones are one."""
        if isinstance(value, float):
            array: Array = np.asarray(value, dtype=np.float32)
        else:
            array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def weight(self, name: str, array: Array) -> str:
        """A weight under its own name, in the external file unless it is tiny."""
        array = np.ascontiguousarray(array)
        if name in self._stored and self._holds(self._stored[name], array):
            self._offsets[name] = self._stored[name]
            self._initializers.append(_external(name, array, self._stored[name]))
            return name
        self.weight_bytes += array.nbytes
        if array.nbytes < _INLINE_BYTES:
            self._initializers.append(numpy_helper.from_array(array, name))
            return name
        align = _PAGE if array.nbytes >= _PAGE else _CACHE_LINE
        offset = -(-self._data.tell() // align) * align
        self._data.seek(offset)
        self._data.write(array.data)
        self._offsets[name] = offset
        self._initializers.append(_external(name, array, offset))
        return name

    def _holds(self, offset: int, array: Array) -> bool:
        """Whether the file has these bytes there: a name may mean something else in another graph."""
        self._data.seek(offset)
        same = self._data.read(array.nbytes) == array.tobytes()
        self._data.seek(0, os.SEEK_END)
        return same

    def view(self, name: str, source: str, array: Array) -> str:
        """A weight that has the bytes of `source` in another shape: the file holds them once."""
        if source not in self._offsets:  # tiny
            self._initializers.append(numpy_helper.from_array(array, name))
        else:
            self._initializers.append(_external(name, array, self._offsets[source]))
        return name

    def once(self, key: Any, make: Callable[[Any], str]) -> str:
        """The value that goes by `key`; `make` is given the key and called where there is none yet.

        A tied head stores its matrix under its embedding's name, and so finds that one's.
        """
        if key not in self.shared:
            self.shared[key] = make(key)
        return self.shared[key]

    def widened(self, name: str, array: Array) -> str:
        """A float16 weight as float32, once; ONNX Runtime folds the cast when it loads the model."""
        return self.once(name, lambda full: self.op("Cast", self.weight(full, array), to=TensorProto.FLOAT))

    def save(self, name: str, metadata: dict[str, str]) -> None:
        """Write the graph; the external file is complete afterwards."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, self._initializers, value_info=self._sizes
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="compress"
        )
        helper.set_model_props(model, metadata)
        self._data.close()
        onnx.save(model, self._graph)


def _external(name: str, array: Array, offset: int) -> onnx.TensorProto:
    """An initializer whose bytes lie in the external file."""
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
