"""Models that see images: the classifier is found and taken off, sizes and means are the authors', trouble is named."""

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smidgen.auto.plan import Plan
from smidgen.core.errors import MissingDependency, ModelError, RecipeError
from smidgen.tasks.base import Asked
from smidgen.tasks.images import image_models
from smidgen.tasks.images.image_input import seen_by_processor, seen_by_timm, with_said
from smidgen.tasks.images.image_models import ImageClassifier, load_image_model, outputs_of, pooled
from smidgen.tasks.models import locate

SEEN = with_said(seen_by_timm({}), 16, None, None)


class Net(nn.Module):
    """A CNN whose classifier is not the last of its layers in order of registration."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.gate = nn.Linear(6, 6)  # a linear layer that is not the classifier
        self.head = nn.Module()
        self.head.fc = nn.Linear(6, 5)
        self.dropout = nn.Dropout(0.5)
        self.end = end or nn.Identity()

    def forward(self, pixels):
        z = self.stem(pixels).mean((2, 3))
        return self.end(self.head.fc(self.dropout(z * self.gate(z).sigmoid())))


def asked_for(name) -> Asked:
    return Asked(model=locate(str(name)), plan=Plan(), device=torch.device("cpu"), seed=0)


def tiny(folder: Path, kind: str, **said) -> Path:
    """A tiny image model of transformers, saved."""
    import transformers

    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    small |= {"intermediate_size": 16, "patch_size": 8}
    if kind == "ResNet":
        small = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    made = getattr(transformers, f"{kind}Config")(**small)
    name = f"{kind}ForImageClassification" if kind in ("ViT", "ResNet") else f"{kind}Model"
    getattr(transformers, name)(made).save_pretrained(folder)
    if said:
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()])
def test_the_features_are_what_the_classifier_is_given(end):
    net = Net(end).eval()
    pixels = torch.rand(4, 3, 16, 16)
    before, names = net((pixels - 0.5) / 0.5), set(net.state_dict())
    model = ImageClassifier(net, 3, with_said(SEEN, None, (0.5,) * 3, (0.5,) * 3), "net").eval()
    assert model.where == "what its classifier head.fc is given"
    assert model.head.in_features == 6
    assert torch.equal(end(net.head.fc(model.features({"pixels": pixels}))), before)
    assert set(net.state_dict()) == names
    copied = copy.deepcopy(model)
    assert copied.tap.given is None
    assert copied.tap is not model.tap
    assert torch.equal(copied({"pixels": pixels}), model({"pixels": pixels}))


def test_a_model_without_classifier_is_taken_as_it_is():
    model = ImageClassifier(nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU()), 3, SEEN, "net")
    assert model.head.in_features == 7
    assert "no linear layer" in model.where
    assert pooled(torch.ones(2, 4, 3, 3)).shape == pooled(torch.ones(2, 9, 4)).shape == (2, 4)
    with pytest.raises(ModelError, match=r"features \(N, D\)"):
        pooled(torch.ones(2))
    with pytest.raises(ModelError, match="gives NoneType"):
        outputs_of(None)


def test_a_model_that_masks_at_random_is_refused(tmp_path):
    body, seen = load_image_model(asked_for(tiny(tmp_path, "ViTMAE", size=16)))
    with pytest.raises(ModelError, match="something else each time"):
        ImageClassifier(body, 3, seen, "it")


def test_images_that_the_model_does_not_take_are_named_with_what_to_say():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(ModelError, match=r"net fails on a batch \(2, 3, 16, 16\) .*task.image_size"):
        ImageClassifier(net, 3, SEEN, "net")


@pytest.mark.parametrize(("kind", "width"), [("ViT", 16), ("ResNet", 12), ("SiglipVision", 16)])
def test_models_of_transformers_are_loaded_with_their_way_of_seeing(tmp_path, kind, width):
    said = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    body, seen = load_image_model(asked_for(tiny(tmp_path, kind, **said)))
    assert (seen.fit.height, seen.fit.width, seen.fit.resample, seen.mean, seen.std) == (
        *(16, 16, 3),
        *((0.5,) * 3, (0.25,) * 3),
    )
    assert seen.why == "its preprocessor_config.json"
    assert ImageClassifier(body, 3, seen, "it").head.in_features == width


def test_a_folder_without_a_processor_gets_the_usual_numbers(tmp_path):
    seen = load_image_model(asked_for(tiny(tmp_path, "ResNet")))[1]
    assert (seen.fit.height, seen.mean[0], seen.why) == (224, 0.485, "nobody says: ImageNet's")


def test_the_fields_of_a_processor_are_understood():
    cut = seen_by_processor({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}).fit
    assert (cut.shortest, cut.height, cut.width) == (256, 224, 224)
    assert seen_by_processor({"size": 224}).fit.shortest is None
    convnext = seen_by_processor({"size": {"shortest_edge": 224}, "crop_pct": 0.875}).fit
    assert (convnext.shortest, convnext.height) == (256, 224)
    assert seen_by_processor({"size": {"shortest_edge": 384}}).fit.shortest is None
    plain = seen_by_processor({"do_normalize": False})
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)
    # (x * 2 - 1 - mean) / std of EfficientNet, as one mean and one deviation of x in 0..1
    offset = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": [0.1] * 3, "image_std": [0.5] * 3}
    seen = seen_by_processor(offset)
    x = 0.3
    assert (x - seen.mean[0]) / seen.std[0] == pytest.approx((2 * x - 1 - 0.1) / 0.5)


def test_what_the_recipe_says_comes_first():
    seen = with_said(seen_by_timm({"input_size": (3, 224, 224), "crop_pct": 0.875}), 112, (0.1,), (0.2,))
    assert (seen.fit.height, seen.fit.shortest, seen.fit.channels) == (112, 128, 1)
    with pytest.raises(RecipeError, match="3 numbers each"):
        with_said(seen_by_timm({}), None, (0.1,), None)


def test_a_function_of_yours_may_say_how_its_model_sees(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))\n"
        "    model.pretrained_cfg = {'input_size': (1, 20, 24), 'mean': (0.1,), 'std': (0.3,)}\n"
        "    return model\n"
    )
    body, seen = load_image_model(asked_for(f"{tmp_path / 'mine.py'}:make"))
    assert (seen.fit.height, seen.fit.width, seen.fit.channels) == (20, 24, 1)
    assert ImageClassifier(body, 3, seen, "mine").where == "what its classifier 3 is given"


def test_timm_makes_the_models_that_it_knows(monkeypatch):
    def create_model(name, pretrained):
        assert pretrained
        if name != "known":
            raise RuntimeError("Unknown model")
        net = Net()
        net.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return net

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    body, seen = load_image_model(asked_for("timm:known"))
    assert isinstance(body, Net)
    assert seen.fit.height == 32
    with pytest.raises(ModelError, match="timm cannot make other: RuntimeError: Unknown model"):
        load_image_model(asked_for("timm:other"))


def test_a_missing_timm_and_a_broken_torchvision_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match="pip install timm"):
        load_image_model(asked_for("timm:any"))

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(image_models, "find_spec", lambda name: True)
    monkeypatch.setattr(image_models, "import_module", broken)
    with pytest.raises(ModelError, match=r"torchvision that is installed does not fit torch .*nms does not exist"):
        load_image_model(asked_for("timm:any"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="pip uninstall torchvision"):
        load_image_model(asked_for(tmp_path))
