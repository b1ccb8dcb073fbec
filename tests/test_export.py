"""ONNX files compute what the torch model computes, in the integers they promise, and verify() notices where not."""

import copy
import json
import math
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks_fixture import Small
from torch import Tensor, nn

from dfkd import verify as verification
from dfkd.classifier import Classifier
from dfkd.compress.graph import with_network
from dfkd.compress.prepare import prepare, round_biases
from dfkd.compress.quantizers import QUANTIZED, quantized_layers
from dfkd.errors import UserError
from dfkd.export import _split_sums, _surround, export_onnx, stored_type
from dfkd.stream import SyntheticStream, from_noise
from dfkd.teachers import Teacher
from dfkd.verify import verify

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MakeTeacher = Callable[..., Teacher]


def images(count: int = 64, size: int = 8) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))


def of_every_width() -> nn.Sequential:
    """Seven convolutions and a linear layer; inputs lie above and around zero, and one name ends as another does."""
    torch.manual_seed(0)
    inner: list[nn.Module] = [nn.Conv2d(6, 6, 3, padding=1)]
    for k in range(5):
        inner += [nn.Identity() if k % 2 else nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)]
    stem, pool = nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(4)
    return nn.Sequential(stem, nn.Sequential(*inner), nn.ReLU(), pool, nn.Flatten(), nn.Linear(24, 4)).eval()


def quantised(network: nn.Module, bits: tuple[int, int], per_channel: bool = True, **options: Any) -> Classifier:
    model = Classifier(network, mean=[0.4], std=[0.3]).eval()
    batches = [model.network_input(images())]
    graph = prepare(network, bits, batches, folded=True, per_channel=per_channel, **options)
    round_biases(graph)
    return with_network(model, graph)


def run(path: Path, shown: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": shown.numpy()})[0])


def stored(path: Path) -> dict[str, str]:
    """The ONNX type of the weights by layer."""
    found = {}
    for tensor in onnx.load(str(path)).graph.initializer:
        if tensor.name.endswith(".quantizer.codes"):
            name = tensor.name.removesuffix(".quantizer.codes").removeprefix("model.")
            found[name] = onnx.TensorProto.DataType.Name(tensor.data_type)
    return found


@pytest.mark.parametrize("per_channel", [True, False])
def test_every_number_of_bits_is_computed_as_in_torch(tmp_path: Path, per_channel: bool) -> None:
    names = [name for name, module in of_every_width().named_modules() if isinstance(module, nn.Conv2d)]
    widths = {name: (8 - k, 2 + k) for k, name in enumerate(names)}
    model = quantised(of_every_width(), (3, 3), per_channel, overrides=widths | {"5": (2, 3)})
    path = export_onnx(model, images(2), tmp_path / "m.onnx")
    layers = quantized_layers(model)
    quantizers = [module for name, module in model.named_modules() if name.startswith("model.quantizers.")]
    assert {layer.quantizer.bits for layer in layers.values()} == set(range(2, 9))
    assert {module.zero in (0, 2 ** (module.bits - 1)) for module in quantizers} == {True, False}
    assert {len(layer.quantizer.scale) for layer in layers.values()} == ({6, 4} if per_channel else {1})
    for count in (1, 3, 7):
        shown = images(count)
        expected, given = model(shown), run(path, shown)
        assert given.shape == (count, 4)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
        assert torch.equal(given.argmax(1), expected.argmax(1))
    assert stored(path) == {name.removeprefix("model."): stored_type(x.quantizer.bits) for name, x in layers.items()}
    assert set(stored(path).values()) == {"INT2", "INT4", "INT8"}
    about = json.loads(onnx.load(str(path)).metadata_props[0].value)
    assert about["bits"]["0"] == [8, 2]
    assert about["input"] == ["batch", 1, 8, 8]
    assert verify(path, model, images(3), repeats=1)["nodes"]["integer_convolutions"] >= 5


def test_eight_bits_run_on_integers(tmp_path: Path, make_teacher: MakeTeacher) -> None:
    teacher = make_teacher(model="dfkd:tiny_residual", kwargs={"width": 16})
    batches = [teacher.network_input(images())]
    model = with_network(teacher, prepare(teacher.model, (8, 8), batches, folded=False, per_channel=True))
    path = export_onnx(model, images(2), tmp_path / "int8.onnx")
    float_path = export_onnx(teacher, images(2), tmp_path / "float.onnx")
    result = verify(path, model, images(256), float_path=float_path, repeats=2)
    convolutions = sum(isinstance(each, nn.Conv2d) for each in model.modules())
    assert convolutions >= 5
    assert result["nodes"] == {
        **{"integer_convolutions": convolutions, "float_convolutions": 0},
        **{"integer_linear": 1, "float_linear": 0},
        **{"integer_additions": result["nodes"]["integer_additions"], "float_additions": 0},
    }
    assert result["nodes"]["integer_additions"] > 0
    assert result["agreement"] >= 97  # biases are not rounded here (see round_biases)
    with torch.no_grad():  # another rounding of the same network: as far from it as the network is from the float one
        shown = teacher(images(256))
        noise = (model(images(256)) - shown).norm() / shown.norm()
    assert result["relative_error"] < noise
    assert result["simulated"] is False
    assert result["size_bytes"] < result["float_size_bytes"]
    assert result["latency_ms"] > 0 < result["float_latency_32_ms"]
    assert any(isinstance(each, QUANTIZED) for each in model.modules())  # the model itself is left as it was

    plain = verify(float_path, teacher, images(7), repeats=1)
    assert plain["max_error"] < 1e-4
    assert plain["agreement"] == 100
    assert plain["nodes"]["integer_convolutions"] == 0

    broken = onnx.load(str(path))
    for tensor in broken.graph.initializer:
        if tensor.name.endswith("linear.quantizer.codes"):
            codes = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes[::-1].copy(), tensor.name))
    onnx.save(broken, str(tmp_path / "broken.onnx"))
    wrong = verify(tmp_path / "broken.onnx", model, [images(64), images(64)], repeats=1)
    assert wrong["n"] == 128
    assert wrong["agreement"] < 90
    assert wrong["relative_error"] > 0.1


class Attention(nn.Module):
    """Two products of activations, and four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.qkv = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.conv(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        return self.head(self.out((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_of_activations_is_no_layer(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    network = Attention().eval()
    for model in (network, prepare(network, (bits, bits), [images()], folded=True, per_channel=True)):
        result = verify(export_onnx(model, images(2), tmp_path / "m.onnx"), model, images(), repeats=1)
        nodes = result["nodes"]
        assert nodes["integer_convolutions"] + nodes["float_convolutions"] == 1
        assert nodes["integer_linear"] + nodes["float_linear"] == 3
        assert result["agreement"] == 100
        assert "of 4 convolutions" in result["note"]


def test_few_bits_run_on_integers_and_agree(tmp_path: Path) -> None:
    def blocks(m: Small, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        x = (m.b(x) + m.c(x)).relu()  # in 4 bits for the next layer, in 8 for the next sum
        return m.head((x + m.d(x)).relu().flatten(1))

    torch.manual_seed(0)
    layers = {name: nn.Conv2d(4, 4, 1) for name in "bcd"}
    network = Small(blocks, a=nn.Conv2d(1, 4, 3), **layers, head=nn.Linear(144, 3))
    model = quantised(network.eval(), (4, 4))
    result = verify(export_onnx(model, images(2), tmp_path / "m.onnx"), model, images(), repeats=1)
    assert (result["nodes"]["integer_convolutions"], result["nodes"]["float_convolutions"]) == (4, 0)
    assert (result["nodes"]["integer_additions"], result["nodes"]["float_additions"]) == (3, 0)
    assert result["simulated"] is False
    assert result["agreement"] == 100
    assert result["relative_error"] < 0.02


def test_a_float_file_of_another_size_is_timed_on_its_own(tmp_path: Path) -> None:
    """A student's teacher may take larger images than the student."""
    small, large = (Classifier(nn.Sequential(nn.Flatten(), nn.Linear(n * n, 3)), input_size=n) for n in (8, 12))
    paths = [export_onnx(model, images(2), tmp_path / f"{k}.onnx") for k, model in enumerate((small, large))]
    assert verify(paths[0], small, images(4), float_path=paths[1], repeats=1)["float_latency_ms"] > 0


def test_images_in_double_precision_are_verified_as_float32_ones(tmp_path: Path) -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    path = export_onnx(model, images(2), tmp_path / "m.onnx")
    assert verify(path, model, [images(9).double()], repeats=1)["agreement"] == 100


def test_times_are_those_of_the_file_the_batch_and_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that an image of the float file moves on by 10 ms, one of the other by 1."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    own, other = (export_onnx(model, images(2), tmp_path / f"{k}.onnx") for k in range(2))
    now, opened, sessions, logits = [0.0], [], verification._session, verification._logits

    def session(path: Path, threads: int, *rest: str) -> Any:
        opened.append((path, sessions(path, threads, *rest), threads))
        return opened[-1][1]

    def timed(session: Any, shown: torch.Tensor) -> torch.Tensor:
        now[0] += len(shown) * (0.01 if any(path == other and each is session for path, each, _ in opened) else 0.001)
        return logits(session, shown)

    monkeypatch.setattr(verification, "_session", session)
    monkeypatch.setattr(verification, "_logits", timed)
    monkeypatch.setattr(verification.time, "perf_counter", lambda: now[0])
    found = verify(own, model, images(40), float_path=other, repeats=3, threads=3)
    assert [found[name] for name in ("latency_ms", "float_latency_ms")] == pytest.approx([1, 10])
    assert [found[name] for name in ("latency_32_ms", "float_latency_32_ms")] == pytest.approx([32, 320])
    assert {threads for *_, threads in opened} == {3} == {found["threads"]}


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x.flatten(1)[:, :3]}


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    path = export_onnx(network, images(2, size=8), tmp_path / "m.onnx")
    (tmp_path / "none.onnx").write_text("no graph")
    endless = SyntheticStream(from_noise(1, 8, 3))
    with torch.no_grad():
        broken = copy.deepcopy(network)
        broken[1].bias[0] = math.nan
    proto = onnx.load(str(path))
    values = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values.flat[0] = math.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, proto.graph.initializer[0].name))
    onnx.save(proto, str(tmp_path / "broken.onnx"))
    cases: list[tuple[Path, nn.Module, Any, int, str]] = [
        (tmp_path / "broken.onnx", network, images(2, size=8), 1, "NaN or infinite"),
        (tmp_path / "gone.onnx", network, images(2, size=8), 1, "ONNX Runtime cannot read .*gone.onnx"),
        (tmp_path / "none.onnx", network, images(2, size=8), 1, "ONNX Runtime cannot read .*none.onnx"),
        (path, network, endless, 1, "the stream of images has no end; give it num_batches"),
        (path, network, images(2, size=8), 0, "repeats=0 is not allowed"),
        (path, broken, images(2, size=8), 1, "NaN or infinite"),
        (path, Named(), images(2, size=8), 1, "the model gives a dict; verify compares one that gives logits alone"),
        (
            path,
            nn.Flatten(),
            images(2, size=8),
            1,
            r"gives logits \[2, 3\] where the model gives \[2, 64\]; give the model",
        ),
    ]
    for file, model, given, repeats, message in cases:
        with pytest.raises(UserError, match=message):
            verify(file, model, given, repeats=repeats)
    with pytest.raises(UserError, match=r"ONNX Runtime cannot read .*gone.onnx"):
        verify(path, network, images(2, size=8), float_path=tmp_path / "gone.onnx")


def test_one_logit_agrees_by_its_sign_and_an_empty_batch_says_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    path = export_onnx(network, images(2, size=8), tmp_path / "m.onnx")
    x = torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        other = copy.deepcopy(network)
        other[1].weight.neg_()
        other[1].bias.neg_()
    found = [verify(path, model, [x, x[:0]], repeats=1) for model in (network, other)]
    assert [(each["agreement"], each["n"]) for each in found] == [(100, 40), (0, 40)]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_run_in_float_are_called_simulated(tmp_path: Path, bits: int) -> None:
    model = quantised(of_every_width(), (bits, bits), ignore=["0", "1.*"], ends=(bits, bits))
    assert verify(export_onnx(model, images(2), tmp_path / "m.onnx"), model, images(), repeats=1)["simulated"] is True


def test_what_runs_on_integers_by_half_is_not_simulated(tmp_path: Path) -> None:
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "none", [], []))
    onnx.helper.set_model_props(proto, {"dfkd": json.dumps({"bits": {"a": [8, 8]}})})
    onnx.save(proto, str(tmp_path / "m.onnx"))

    def simulated(convolutions: int, linear: int) -> bool:
        nodes = {"integer_convolutions": convolutions, "float_convolutions": 3 - convolutions}
        nodes |= {"integer_linear": linear, "float_linear": 1 - linear}
        return verification._on_integers(tmp_path / "m.onnx", nodes)["simulated"]

    assert [simulated(*each) for each in ((0, 1), (1, 0), (1, 1), (2, 0), (3, 1))] == [True, True, False, False, False]


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(0.1)])
def test_convolutions_before_any_activation_run_on_integers(tmp_path: Path, act: nn.Module) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), act, nn.Conv2d(8, 8, 3, groups=8), act, nn.Conv2d(8, 8, 1), act]
    model = quantised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4)).eval(), (8, 8))
    result = verify(export_onnx(model, images(2), tmp_path / "m.onnx"), model, images(), repeats=1)
    assert (result["nodes"]["integer_convolutions"], result["nodes"]["float_convolutions"]) == (3, 0)
    assert result["relative_error"] < 0.01


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_averages_that_reach_beyond_a_map_agree(tmp_path: Path, functional: bool, padded: bool) -> None:
    """ONNX Runtime's average of integers divides by what lies beyond, too."""
    torch.manual_seed(0)
    given = {"ceil_mode": True, "count_include_pad": padded}
    pool = Average(given) if functional else nn.AvgPool2d(2, **given)
    layers = [nn.Conv2d(1, 4, 2), nn.ReLU(), pool, nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)]
    model = quantised(nn.Sequential(*layers).eval(), (8, 8))
    path = export_onnx(model, images(2), tmp_path / "m.onnx")
    assert verify(path, model, images(), repeats=1)["relative_error"] < 1e-4


class Average(nn.Module):
    """F.avg_pool2d."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2, **self.given)


class Branches(nn.Module):
    """Two layers with the same weights, and two whose weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.b, self.d, self.head = copy.deepcopy(self.a), copy.deepcopy(self.c), nn.Linear(8, 3)
        for layer in (self.c, self.d):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.stem(x).relu()).relu()).relu()
        return self.head((x + self.c(x) + self.d(x)).mean((2, 3)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layers_of_equal_weights_have_their_own_in_a_file(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    model = quantised(Branches().eval(), (bits, 8))
    result = verify(export_onnx(model, images(2), tmp_path / "m.onnx"), model, images(), repeats=1)
    assert result["relative_error"] < 0.01
    assert result["nodes"]["float_convolutions"] == 0


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # an image and its mirror image
            a, b = torch.cat([x, x.flip(3)]).mean((2, 3)).chunk(2)
            return a + b

    with pytest.raises(UserError, match=r"^Both cannot be exported for any number of images: its forward counts"):
        export_onnx(Both(), images(2), tmp_path / "m.onnx")
    for pool in (nn.AvgPool2d(2, divisor_override=3), Average({"divisor_override": 3})):
        with pytest.raises(UserError, match=r"^ONNX has no divisor_override of an average pool; multiply"):
            export_onnx(nn.Sequential(pool), images(2), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_channel_without_weights_keeps_its_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()).eval()
    with torch.no_grad():
        network[0].weight[1] = 0
        model = quantised(network, (8, 8))
        quantized_layers(model)["model.0"].bias[1] = 0.3  # between the steps of the input
    given = run(export_onnx(model, images(2), tmp_path / "m.onnx"), images())
    torch.testing.assert_close(given[:, 1], torch.full((64,), 0.3), rtol=1e-6, atol=0)
    torch.testing.assert_close(given, model(images()), atol=1e-5, rtol=0)


def test_quantisers_and_sums_are_repeated_without_a_change_of_a_value() -> None:
    """A pad of another value than zero is rounded once; a sum for two readers is added for each, a product is not."""

    def blocks(m: Small, x: Tensor) -> Tensor:
        x = m.b(nn.functional.pad(m.a(x).relu(), (1,) * 4, value=-0.5)).relu()
        x = (x + m.c(x)).relu()
        x = x + m.d(x)
        x = x * x
        return m.f((x + m.e(x)).relu())

    torch.manual_seed(0)
    layers = {name: nn.Conv2d(4, 4, 1) for name in "bcdef"}
    network = Small(blocks, a=nn.Conv2d(1, 4, 3), **layers).eval()
    graph = prepare(network, (4, 4), [images()], folded=True, per_channel=True)
    wanted = graph(images())
    _surround(graph)
    _split_sums(graph)
    graph.recompile()
    assert torch.equal(graph(images()), wanted)
    sums = [node for node in graph.graph.nodes if node.target is operator.add]
    assert len(sums) == 3 + 1  # that of the second layer is read by the third and by the next sum


def test_weights_take_the_smallest_type_that_holds_them() -> None:
    stored_in = [next(width for width in (2, 4, 8) if bits <= width) for bits in range(2, 9)]
    assert [stored_type(bits) for bits in range(2, 9)] == [f"INT{width}" for width in stored_in]


def test_a_resizing_classifier_is_exported_at_its_own_size(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model = Classifier(network, mean=[0.5], std=[0.2], input_size=4)
    path = export_onnx(model, images(1), tmp_path / "m.onnx")
    assert [each.dim_value for each in onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim[1:]] == [1, 4, 4]
    assert verify(path, model, images(5), repeats=1)["max_error"] < 1e-5


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(UserError, match=r"^Branching cannot be exported to ONNX: [^\n]+; replace") as caught:
        export_onnx(Branching(), images(1), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    model = quantised(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (2, 4), ends=(2, 4))
    with pytest.raises(UserError, match="opset 18 is too low for this model; give 25"):
        export_onnx(model, images(1), tmp_path / "m.onnx", opset=18)
    with pytest.raises(UserError, match=r"the example has shape \[1, 8, 8\]; give images \[B, C, H, W\]"):
        export_onnx(model, images(1)[0], tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"is a folder; give the file to write, such as .*model\.onnx"):
        export_onnx(model, images(1), tmp_path)
    with pytest.raises(UserError, match=r"takes images of \[1, 4, 4\], not \[1, 5, 5\]"):
        verify(export_onnx(nn.Flatten(), images(1, 4), tmp_path / "f.onnx"), nn.Flatten(), images(1, 5))
    with pytest.raises(UserError, match="no image"):
        verify(export_onnx(model, images(1), tmp_path / "m.onnx"), model, [])


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    call = verify if missing == "onnxruntime" else lambda path, *given: export_onnx(*given, path)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript and onnxruntime: pip install 'dfkd\[export\]'"):
        call(tmp_path / "m.onnx", nn.Flatten(), images(1))


def test_a_network_in_training_is_exported_as_it_infers_at_the_opset_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).train()
    path = export_onnx(network, images(2), tmp_path / "new" / "folder" / "m.onnx", opset=20)
    assert network.training
    assert [entry.version for entry in onnx.load(str(path)).opset_import if not entry.domain] == [20]
    network[1].p = 1.0  # what verify() compares with is in eval mode too
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[2].bias += torch.tensor([2.0, 0.0, 0.5])
    shown = images(6)
    found = verify(path, other, shown, repeats=1)
    with torch.no_grad():
        wanted, given = (each.eval()(shown).double() for each in (other, network))
    assert found["max_error"] == pytest.approx(2.0, rel=1e-4)
    assert found["relative_error"] == pytest.approx(float((given - wanted).norm() / wanted.norm()), rel=1e-4)
    agree = (given.argmax(1) == wanted.argmax(1)).double().mean()
    assert found["agreement"] == pytest.approx(100 * float(agree), abs=0.01)


def test_a_bias_that_int32_does_not_hold_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        network[1].bias[1] = 1e7
    model = quantised(network, (8, 8))
    assert (
        verify(export_onnx(model, images(2), tmp_path / "m.onnx"), model, images(), repeats=1)["relative_error"] < 1e-5
    )


def test_a_session_has_the_threads_it_is_asked_for(tmp_path: Path) -> None:
    path = export_onnx(nn.Flatten(), images(2), tmp_path / "m.onnx")
    options = verification._session(path, 3).get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_warming_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    class Session:
        def get_inputs(self) -> Any:
            return [type("Input", (), {"shape": ["batch", 1, 8, 8]})]

    def timed(session: Any, shown: torch.Tensor) -> None:
        calls[0] += 1
        now[0] += 1.0 if calls[0] <= 3 else 0.002

    monkeypatch.setattr(verification, "_logits", timed)
    monkeypatch.setattr(verification.time, "perf_counter", lambda: now[0])
    assert verification._latencies({"": Session()}, images(1), 2) == {"": 2.0}
