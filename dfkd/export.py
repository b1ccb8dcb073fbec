"""Networks as ONNX files, float or with integer weights and activations; dfkd.verify runs them.

A quantised file holds QuantizeLinear and DequantizeLinear around the operators, which ONNX Runtime fuses into 8-bit
integer kernels. Its weights are integers of the smallest type that holds them: 2 bits INT2, 3 and 4 INT4, else INT8.

On x86 without VNNI these kernels add pairs of products in 16 bits, which can overflow; there, set ONNX Runtime's
session.x64quantprecision to 1 (slower), as verify() does.
"""

import copy
import importlib
import io
import json
import math
import operator
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfkd.classifier import Classifier
from dfkd.compress.graph import ADDS, CARRIERS, RELUS, fold, kind, network_of, norms
from dfkd.compress.quantizers import (
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedLinear,
    activation_quantizers,
    quantized_layers,
)
from dfkd.errors import UserError, in_a_line
from dfkd.whole import whole

OPSET = 18  # the exporter's own
OPSETS = {"INT8": OPSET, "INT4": 21, "INT2": 25}  # the first that has the type


def package(name: str) -> Any:
    """An optional package; UserError with the extra to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError("ONNX export needs onnx, onnxscript and onnxruntime: pip install 'dfkd[export]'") from None


def require_onnx() -> None:
    """UserError where a package that export and verification need is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        package(name)


def stored_type(bits: int) -> str:
    """The ONNX type of weights in so many bits."""
    return "INT8" if bits > 4 else "INT4" if bits > 2 else "INT2"


def _node(name: str, *inputs: Tensor, dtype: torch.dtype = torch.float32, **attributes: Any) -> Tensor:
    """An ONNX node in the export; what it gives has the shape of its first input."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=inputs[0].shape)


class _Codes(nn.Module):
    """An ActivationQuantizer in ONNX's operators: to uint8 codes, clipped to as many levels as it has, and back.

    Unsigned times signed (the weights' codes) is what x86 has fast kernels for.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("scale", quantizer.scale.detach().reshape(()))
        for name, value in (("zero", quantizer.zero), ("low", 0), ("high", 2**quantizer.bits - 1)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        codes = _node("QuantizeLinear", x, self.scale, self.zero, dtype=torch.uint8)
        if self.bits < 8:  # on the codes: a clip of the values would keep convolution and quantiser from fusing
            codes = _node("Clip", codes, self.low, self.high, dtype=torch.uint8)
        return _node("DequantizeLinear", codes, self.scale, self.zero)


class _Constant(nn.Module):
    """Integers [K, ...] with a scale, [K] or one for all; called with whatever, it gives their values."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale if len(scale) > 1 else scale[0])

    def forward(self, _: Tensor) -> Tensor:
        return _node("DequantizeLinear", self.codes, self.scale, axis=0)


class _Conv2d(QuantizedConv2d):
    stored_bias: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        if self.stored_bias is not None:
            return self._conv_forward(input, self.quantizer(self.weight), self.stored_bias(input))
        output = self._conv_forward(input, self.quantizer(self.weight), None)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


class _Linear(QuantizedLinear):
    stored_bias: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        if self.stored_bias is not None:
            return F.linear(input, self.quantizer(self.weight), self.stored_bias(input))
        output = F.linear(input, self.quantizer(self.weight))
        return output if self.bias is None else output + self.bias


def _quantises(graph: fx.GraphModule, node: fx.Node) -> bool:
    return kind(graph, node) is ActivationQuantizer


def _moves(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node hands on values that it is given, or zeros, which every grid holds."""
    if node.target is operator.getitem:
        return isinstance(node.args[1], tuple | slice)
    if node.target is F.pad:
        return not (node.args[3] if len(node.args) > 3 else node.kwargs.get("value"))
    return kind(graph, node) in CARRIERS


def _surround(graph: fx.GraphModule) -> None:
    """Repeat quantisers on both sides of what only moves values: exact, and ONNX Runtime fuses an operator only where
    quantisers stand right next to it."""
    for node in [node for node in graph.graph.nodes if _quantises(graph, node)]:
        movers = [user for user in node.users if _moves(graph, user)]
        while movers:
            mover = movers.pop()
            with graph.graph.inserting_after(mover):
                again = graph.graph.call_module(str(node.target), (mover,))
            for user in set(mover.users) - {again}:
                user.replace_input_with(mover, again)
            movers += [user for user in again.users if _moves(graph, user)]
        at: Any = node.args[0]
        while _moves(graph, at) and len(at.users) == 1 and not _quantises(graph, at.args[0]):
            with graph.graph.inserting_before(at):
                at.replace_input_with(at.args[0], graph.graph.call_module(str(node.target), (at.args[0],)))
            at = at.args[0].args[0]


def _split_sums(graph: fx.GraphModule) -> None:
    """Compute a sum twice where two quantisers read it (after its ReLU), each for one: ONNX Runtime adds integers only
    for a single reader. The second takes its operands the other way round, else the two would be merged again."""
    for node in list(graph.graph.nodes):
        if kind(graph, node) not in ADDS or node.op != "call_function" or len(node.args) != 2 or node.kwargs:
            continue
        users = list(node.users)
        end = users[0] if len(users) == 1 and kind(graph, users[0]) in RELUS else node
        targets = list(dict.fromkeys(user.target for user in end.users))
        if len(targets) != 2 or not all(_quantises(graph, user) for user in end.users):
            continue
        second = [user for user in end.users if user.target == targets[1]]
        with graph.graph.inserting_after(end):
            twin = last = graph.graph.call_function(operator.add, (node.args[1], node.args[0]))
        if end is not node:
            with graph.graph.inserting_after(twin):
                last = graph.graph.node_copy(end, lambda old: old)
            last.replace_input_with(node, twin)
        for user in second:
            user.replace_input_with(end, last)


def _store(graph: fx.GraphModule) -> dict[str, list[int]]:
    """Replace every quantiser by its ONNX form, in place; returns the bits of weights and input by layer."""
    layers = quantized_layers(graph)
    calls = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    quantizers = activation_quantizers(graph)
    inputs = {name: quantizers.get(str(getattr(calls[name].args[0], "target", ""))) for name in layers}
    bits = {name: [layer.quantizer.bits, getattr(inputs[name], "bits", 32)] for name, layer in layers.items()}
    for name, layer in layers.items():
        codes, scale = layer.quantizer.codes(layer.weight), layer.quantizer.scale.detach()
        # In all 8 bits, whatever they were: the bias then counts in finer steps. Below 5 bits the file widens them.
        wide = 2 ** (8 - layer.quantizer.bits)
        codes, scale = (codes * wide if stored_type(layer.quantizer.bits) == "INT8" else codes), scale / wide
        given = inputs[name]
        layer.stored_bias = None
        if given is not None and layer.bias is not None:
            bias, step = layer.bias.detach(), given.scale.detach()
            if len(scale) > 1:  # the bias counts in steps of input times weights: where these are zero, any will do
                idle = (codes.flatten(1) == 0).all(1) & (bias != 0)
                scale = torch.where(idle, bias.abs() / step * 2**-20, scale)
            units = (bias.double() / (step * scale)).round()
            if units.abs().max() < 2**31:
                layer.stored_bias = _Constant(units.to(torch.int32), step * scale)
        layer.quantizer = _Constant(codes, scale)
        layer.__class__ = _Conv2d if isinstance(layer, nn.Conv2d) else _Linear
    for name, quantizer in quantizers.items():
        graph.set_submodule(name, _Codes(quantizer))
    graph.recompile()
    return bits


def _own_weights(proto: Any) -> None:
    """Give every layer its own weights, in place, where the exporter has made one of equal ones: ONNX Runtime prepares
    each layer's by name."""
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    taken: set[str] = set()
    readers: dict[str, list[tuple[Any, int]]] = {}
    for reader in proto.graph.node:
        for k, name in enumerate(reader.input):
            readers.setdefault(name, []).append((reader, k))
    for node in list(proto.graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        for count, (reader, k) in enumerate(readers.get(node.output[0], [])):
            own = node if not count else proto.graph.node.add()
            if count:
                own.CopyFrom(node)
                own.name, own.output[0] = f"{node.name}.{count}", f"{node.output[0]}.{count}"
                reader.input[k] = own.output[0]
            if own.input[0] in taken:
                codes = proto.graph.initializer.add()
                codes.CopyFrom(stored[own.input[0]])
                own.input[0] = codes.name = f"{own.input[0]}.{own.name}"
            taken.add(own.input[0])
    # New nodes stand at the end, after what reads them.
    nodes = sorted(proto.graph.node, key=lambda node: node.op_type != "DequantizeLinear" or node.input[0] not in taken)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _pack(proto: Any, bits: dict[str, list[int]], prefix: str) -> None:
    """Store the weights of few bits in their own type, in place, and write out zero points.

    They are widened to 8 bits: ONNX Runtime does that once, when it loads the file, and then finds the INT8 that its
    convolutions want. QGemm wants a zero point, and ONNX Runtime's precision mode one that no other layer shares.
    """
    onnx = package("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        name, scale = node.input[0], stored[node.input[1]]
        codes = stored[name]
        proto.graph.initializer.append(
            helper.make_tensor(f"{node.name}.zero", codes.data_type, scale.dims, [0] * math.prod(scale.dims))
        )
        node.input.append(f"{node.name}.zero")
        layer = name.removeprefix(prefix).partition(".quantizer.codes")[0]
        own = stored_type(bits[layer][0]) if layer in bits else "INT8"
        if own != "INT8":
            values = onnx.numpy_helper.to_array(codes)
            dtype = helper.tensor_dtype_to_np_dtype(types.DataType.Value(own))
            codes.CopyFrom(onnx.numpy_helper.from_array(values.astype(dtype), name))
            factor = helper.make_tensor(f"{name}.factor", types.INT32, [], [2 ** (8 - bits[layer][0])])
            proto.graph.initializer.append(factor)
            node.input[0] = f"{name}.wide"
            widen = [
                helper.make_node("Cast", [name], [f"{name}.int32"], to=types.INT32),
                helper.make_node("Mul", [f"{name}.int32", factor.name], [f"{name}.product"]),
                helper.make_node("Cast", [f"{name}.product"], [f"{name}.wide"], to=types.INT8),
            ]
            for step in reversed(widen):
                proto.graph.node.insert(0, step)


def export_onnx(model: nn.Module, example: Tensor, path: str | Path, *, opset: int | None = None) -> Path:
    """Write a float or quantised model as one ONNX file: images [B, C, H, W] in [0, 1] for any B -> logits [B, K].

    A Classifier's normalisation is in the file, its resize is not: H and W are its input_size where it has one, else
    the example's. Quantised layers run on ONNX Runtime's 8-bit integer kernels whatever their bits: fewer are clipped
    codes, exact where the biases lie on int32's grid (see dfkd.compress.prepare.round_biases). One whose output is read
    at two widths, as the stem of a residual network in 4 bits, runs in float.
    The file's metadata names the image size, and the bits by layer. opset is by default the lowest that serves.
    Raises UserError where a package is missing, an operator does not export or the opset lacks a type.
    """
    onnx = package("onnx")
    package("onnxscript")
    model = copy.deepcopy(model).cpu().float().eval()
    network: Any = network_of(model)
    about: dict[str, Any] = {"bits": {}}
    if layers := quantized_layers(network):
        if not isinstance(network, fx.GraphModule):
            raise UserError(
                f"a quantised {type(network).__name__} is no graph; export what compress.prepare.prepare gave"
            )
        if set(norms(network)) & set(layers):
            fold(network)
        _surround(network)
        _split_sums(network)
        about = {"bits": _store(network)}
    needed = max([OPSETS[stored_type(weight_bits)] for weight_bits, _ in about["bits"].values()], default=OPSET)
    if opset is not None and opset < needed:
        raise UserError(f"opset {opset} is too low for this model; give {needed} or more, or leave it out")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the file to write, such as {Path(path) / 'model.onnx'}")
    if example.dim() != 4:
        raise UserError(f"the example has shape {list(example.shape)}; give images [B, C, H, W], such as images[:1]")
    images = example[:1].detach().cpu().float()
    if isinstance(model, Classifier):  # a file cannot hold its antialiased resize
        images = model.resized(images)
    proto = _exported(model, images, opset or needed)
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError(
            f"{type(network).__name__} cannot be exported for any number of images: its forward counts them (a chunk "
            "or a view along the first axis); let it compute with x.shape[0], or keep the model in torch"
        )
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces: as much again as the weights of a small network
    del proto.graph.metadata_props[:], proto.graph.value_info[:]
    _own_weights(proto)
    _pack(proto, about["bits"], "model." if isinstance(model, Classifier) else "")
    onnx.helper.set_model_props(
        proto, {"dfkd": json.dumps({"input": ["batch", *images.shape[1:]], "range": [0, 1], **about})}
    )
    proto.ir_version = onnx.helper.find_min_ir_version_for(list(proto.opset_import))
    onnx.checker.check_model(proto, full_check=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(Path(path)) as draft:
        onnx.save(proto, str(draft))
    return Path(path)


def _exported(model: nn.Module, images: Tensor, opset: int) -> Any:
    """The exporter's file of a model, without its chatter."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                model,
                (torch.cat([images, images]),),  # a batch of one would be taken for a constant
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # whatever a stranger's forward may do in an export
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = in_a_line(cause)
            name = type(network_of(model)).__name__
            raise UserError(
                f"{name} cannot be exported to ONNX: {type(cause).__name__}: {reason}; replace that operator, or keep "
                "the model in torch"
            ) from None
    for node in program.exported_program.graph.nodes:
        if str(node.target).startswith("aten.avg_pool2d") and len(node.args) > 6 and node.args[6]:
            raise UserError("ONNX has no divisor_override of an average pool; multiply what the pool gives instead")
    return program.model_proto
