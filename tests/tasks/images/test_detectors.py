"""Detectors: a small one with a head like YOLO's, and a small YOLOS; classes grow, and old ones stay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smidgen
from smidgen.core.errors import ModelError
from smidgen.core.fingerprint import fingerprint
from smidgen.core.targets import Targets
from smidgen.methods.lora import LoRA
from smidgen.methods.selective import Selective
from smidgen.tasks.images.detectors import Detector, DetrDetector, YoloDetector, detector_of

SIDE = 32


class Detect(nn.Module):
    """A head as ultralytics 8.4 has it, of one level and without a distribution of distances."""

    def __init__(self, nc: int) -> None:
        super().__init__()
        self.nc, self.reg_max, self.no, self.stride = nc, 1, nc + 4, torch.tensor([8.0])
        self.cv2 = nn.ModuleList([nn.Sequential(nn.Conv2d(6, 4, 1))])
        self.cv3 = nn.ModuleList([nn.Sequential(nn.Conv2d(6, 5, 1), nn.SiLU(), nn.Conv2d(5, nc, 1))])

    def forward(self, x: Tensor) -> Any:
        raw = {"boxes": self.cv2[0](x).flatten(2), "scores": self.cv3[0](x).view(len(x), self.nc, -1), "feats": [x]}
        return raw if self.training else (torch.cat([raw["boxes"].exp() * 8, raw["scores"].sigmoid()], 1), raw)


class Yolo(nn.Module):
    """What a DetectionModel of ultralytics looks like from outside."""

    def __init__(self, nc: int = 2) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), Detect(nc))
        self.names = {i: f"old {i}" for i in range(nc)}
        self.nc, self.criterion = nc, "stale"
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def loss(self, batch: dict[str, Tensor], predictions: Any) -> tuple[Tensor, Any]:
        """Each cell is to say the classes of its image; boxes are to be as large as the first."""
        self.seen = batch
        raw = predictions[1]
        wanted = torch.zeros_like(raw["scores"])
        wanted[batch["batch_idx"].long(), batch["cls"][:, 0].long()] = 1
        losses = torch.stack([F.binary_cross_entropy_with_logits(raw["scores"], wanted), raw["boxes"].square().mean()])
        return losses * len(batch["img"]), None


def tiny_yolos() -> nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "old 0", 1: "old 1"}
    return YolosForObjectDetection(
        YolosConfig(**sizes, image_size=[SIDE, SIDE], patch_size=8, num_detection_tokens=5, id2label=names)
    )


BODIES = [pytest.param(Yolo, id="yolo"), pytest.param(tiny_yolos, id="yolos")]


def batch() -> dict[str, Tensor]:
    targets = torch.full((3, 2, 5), -1.0)
    targets[0, 0] = torch.tensor([0, 4, 8, 20, 24])
    targets[0, 1] = torch.tensor([2, 0, 0, 16, 8])
    targets[2, 0] = torch.tensor([2, 8, 8, 24, 32])
    return {"image": torch.rand(3, 3, SIDE, SIDE), "targets": targets}


def detector(make: Callable[[], nn.Module], *new: str) -> Detector:
    made = detector_of(make(), "tiny")
    made.grow(new)
    return made.train()


@pytest.mark.parametrize("make", BODIES)
def test_outputs_are_a_loss_and_boxes_with_scores_between_0_and_1(make: Callable[[], nn.Module]) -> None:
    out = detector(make, "new")(batch())
    assert out["loss"].shape == ()
    assert out["boxes"].shape == (3, out["scores"].shape[1], 4)
    assert out["scores"].shape[2] == 3
    assert (out["scores"] >= 0).all()
    assert (out["scores"] <= 1).all()


@pytest.mark.parametrize("make", BODIES)
def test_old_classes_keep_their_scores_and_the_body_its_tensors(make: Callable[[], nn.Module]) -> None:
    old, rows = detector(make).eval(), batch()
    rows["targets"].fill_(-1)
    grown = copy.deepcopy(old)
    before = old(rows)
    grown.grow(["new 0", "new 1"])
    after = grown(rows)
    assert torch.equal(after["boxes"], before["boxes"])
    if isinstance(old, DetrDetector):  # they compete: what is the same are the ratios
        ratio = after["scores"][..., :2] / before["scores"]
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    else:
        assert torch.equal(after["scores"][..., :2], before["scores"])
    assert grown.names == ["old 0", "old 1", "new 0", "new 1"]
    assert list(grown.body.state_dict()) == list(old.body.state_dict())
    size = 5 if isinstance(old, YoloDetector) else 16
    assert sum(p.numel() for p in grown.head.parameters()) == 2 * (size + 1)  # V and c
    assert fingerprint(grown.body) == fingerprint(old.body)


@pytest.mark.parametrize("make", BODIES)
def test_new_classes_learn_and_copies_have_heads_of_their_own(make: Callable[[], nn.Module]) -> None:
    model = detector(make, "new")
    model.body.requires_grad_(False)
    twin = copy.deepcopy(model)
    rows = batch()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(rows)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert float(twin(rows)["loss"].detach()) == losses[0]


@pytest.mark.parametrize("make", BODIES)
def test_classes_that_nobody_marked_get_no_gradient(make: Callable[[], nn.Module]) -> None:
    model = detector(make, "new")
    model.teach([False, True, True])
    model(batch() | {"targets": torch.tensor([[[2.0, 0, 0, 8, 8]]] * 3)})["loss"].backward()
    if isinstance(model, YoloDetector):
        classifier = model.body.model[-1].cv3[0][-1]
    else:
        classifier = [m for m in model.body.class_labels_classifier.modules() if isinstance(m, nn.Linear)][-1]
    assert not classifier.weight.grad[0].any()
    assert classifier.weight.grad[1].any()


def learner(*, remember: bool) -> tuple[Detector, smidgen.AdapterSet]:
    """A Yolo that is to learn a new class; nobody marked its first own one."""
    torch.manual_seed(0)
    model = detector(Yolo, "new")
    model.teach([False, True, True], remember=remember)
    return model, smidgen.attach(
        model.body, LoRA(rank=2, targets=["model.0", "*.cv2.0.0", "*.cv3.0.0", "*.cv3.0.2"]), seed=0
    )


def given(model: Detector, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of the class that is to be remembered, and what boxes are made of."""
    raw = model.body(rows["image"])[1]
    return raw["scores"][:, 0], raw["boxes"]


def test_what_is_to_be_remembered_is_part_of_the_loss() -> None:
    model, adapters = learner(remember=True)
    plain, _ = learner(remember=False)
    rows = batch() | {"targets": torch.tensor([[[2.0, 0, 0, 8, 8]]] * 3)}
    assert torch.equal(model(rows)["loss"], plain(rows)["loss"])  # nothing is forgotten yet
    before = [tensor.detach() for tensor in given(model, rows)]
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.3)
        unlearned = model(rows)["loss"]  # judging costs no second run
    scores, boxes = ((now - was).square().mean() for now, was in zip(given(model, rows), before, strict=True))
    assert scores > 0
    assert boxes > 0
    loss = model(rows)["loss"]
    torch.testing.assert_close(loss - unlearned, 3 * 0.1 * (scores + boxes))
    assert adapters.active == "default"
    loss.backward()
    old = model.body.model[-1].cv3[0][-1].smidgen.get("default")
    assert old.B.grad[0].any()  # the old class's own row learns to stay


def test_a_detector_that_remembers_forgets_less_while_it_learns() -> None:
    drift, losses = {}, {}
    for remember in (False, True):
        model, adapters = learner(remember=remember)
        rows = batch() | {"targets": torch.tensor([[[2.0, 0, 0, 8, 8]]] * 3)}
        before = given(model, rows)[0].detach()
        optimizer = torch.optim.Adam([*adapters.parameters(), *model.head.parameters()], lr=0.02)
        first = float(model(rows)["loss"].detach())
        for _ in range(40):
            optimizer.zero_grad()
            model(rows)["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            drift[remember] = float((given(model, rows)[0] - before).square().mean())
            losses[remember] = float(model(rows)["loss"]) / first
    assert drift[True] < 0.1 * drift[False]
    assert losses[True] < 0.9


@pytest.mark.parametrize("make", BODIES)
def test_batch_statistics_rest_while_training(make: Callable[[], nn.Module]) -> None:
    model = detector(make, "new")
    before = {name: tensor.clone() for name, tensor in model.body.state_dict().items()}
    model(batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.body.state_dict().items())


@pytest.mark.parametrize("make", BODIES)
def test_an_adapter_sits_beside_grown_classes_and_comes_off(make: Callable[[], nn.Module]) -> None:
    model, rows = detector(make, "new").eval(), batch()
    before = model(rows)["scores"]
    adapters = smidgen.attach(model.body, LoRA(rank=2), seed=0)
    assert torch.equal(model(rows)["scores"], before)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.3)
    assert not torch.equal(model(rows)["scores"], before)
    adapters.detach()
    assert torch.equal(model(rows)["scores"], before)


def test_yolo_is_told_boxes_as_shares_with_the_image_they_are_in() -> None:
    model = detector(Yolo, "new")
    model(batch())
    seen = model.body.seen
    assert seen["batch_idx"].tolist() == [0, 0, 2]
    assert seen["cls"][:, 0].tolist() == [0, 2, 2]
    assert seen["bboxes"][0].tolist() == pytest.approx([12 / 32, 16 / 32, 16 / 32, 16 / 32])
    assert model.body.criterion is None  # made anew for three classes
    assert model.multiple == 8


def test_boxes_of_yolo_come_out_as_corners() -> None:
    model, rows = detector(Yolo, "new"), batch()
    centred, corners = model.body(rows["image"])[0][:, :4].mT, model(rows)["boxes"]
    torch.testing.assert_close(corners[..., :2] + corners[..., 2:], 2 * centred[..., :2])
    torch.testing.assert_close(corners[..., 2:] - corners[..., :2], centred[..., 2:])


def test_a_loss_of_transformers_is_the_models_own() -> None:
    model, rows = detector(tiny_yolos), batch()
    rows["targets"][rows["targets"] == 2] = 1
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[12, 16, 16, 16], [8, 4, 16, 8]]) / SIDE},
        {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[16, 20, 16, 24]]) / SIDE},
    ]
    rows["targets"][0, 0, 0] = 0
    pixels = (rows["image"] - model.mean) / model.std
    own = model.body(pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(model(rows)["loss"], 3 * own)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 1)), "is a Sequential, and no detector that is known"),
        (type("Half", (nn.Module,), {"model": nn.Sequential(Detect(2))})(), "has no loss"),
    ],
)
def test_a_model_that_is_no_detector_is_refused(body: nn.Module, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        detector_of(body, "tiny")


def test_a_transformers_model_of_another_kind_is_refused() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ModelError, match="YOLOS, DETR and Table Transformer can be tuned"):
        detector_of(BertModel(config), "tiny")


class Joining(nn.Identity):
    """A layer that reads several others, as ultralytics marks it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = [-1, 0]


def test_the_last_stage_of_a_yolo_begins_where_layers_are_joined() -> None:
    body = Yolo()
    *layers, detect = body.model
    detect.register_module("dfl", nn.Conv2d(1, 1, 1))  # turns distributions into distances: nothing to learn
    body.model = nn.Sequential(*layers, nn.Upsample(), Joining(), nn.Conv2d(6, 6, 1), detect)
    assert detector_of(body, "tiny").last_stage() == ["model.4.*", "model.5.cv2.*", "model.5.cv3.*"]
    assert detector_of(Yolo(), "tiny").last_stage() == ["model.2.cv2.*", "model.2.cv3.*"]


def test_the_last_stage_of_a_detr_is_its_decoder_and_of_a_yolos_its_last_third() -> None:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig, YolosConfig, YolosForObjectDetection

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"])
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}
    detr = DetrForObjectDetection(
        DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes, **heads)
    )
    found = ["class_labels_classifier", "bbox_predictor", "class_labels_classifier.*", "bbox_predictor.*"]
    decoder = ["model.decoder.layers.0.*", "model.decoder.layers.1.*"]
    assert detector_of(detr, "tiny").last_stage() == [*decoder, *found]
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}
    yolos = YolosForObjectDetection(YolosConfig(**sizes, image_size=[SIDE, SIDE], patch_size=8))
    assert detector_of(yolos, "tiny").last_stage() == [f"vit.encoder.layer.{i}.*" for i in (4, 5)] + found


@pytest.mark.parametrize("make", BODIES)
def test_selective_tuning_finds_weights_in_the_last_stage(make: Callable[[], nn.Module]) -> None:
    made = detector(make, "new")
    method = Selective(targets=made.last_stage(), by="magnitude", grain="tensors", budget=0.3)
    sites = smidgen.attach(made.body, method.choose(made.body)).sites("default")
    assert sites
    patterns = Targets(*made.last_stage())
    assert all(patterns.matches(site.path, made.body.get_submodule(site.path)) for site in sites)
