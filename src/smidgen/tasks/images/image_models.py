"""Models that see images: how they want them, and what they know of them before their classifier.

    owner/name, a folder, package:NAME      of transformers: sizes and means from its preprocessor_config.json
    timm:resnet50.a1_in1k                   of timm, if that is installed
    FILE.py:NAME                            a function of yours; the module may say sizes and means as timm's do:
                                            module.pretrained_cfg = {"input_size": (3, 96, 96), "mean": ..., "std": ...}

The classifier is the nn.Linear whose output comes out, or probabilities made of it.  It stays where it is, so that the
body is what its library loads; what it is given are the features z (N, D).  A model that ends otherwise is taken as it
is, and what comes out is pooled.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ...core.errors import MissingDependency, ModelError
from ...core.targets import modules_of
from ..base import Asked, Batch, TaskModel
from ..loading import first_line, load_body
from ..models import TIMM
from .batch_statistics import train_adapted_norms
from .image_input import Seen, seen_by_processor, seen_by_timm


def load_image_model(asked: Asked) -> tuple[nn.Module, Seen]:
    """The model with its classifier, and how it wants images.  Raises ModelError."""
    if asked.model.is_made:
        body = asked.model.made()
        return body, seen_by_timm(getattr(body, "pretrained_cfg", None) or {})
    if asked.model.source.startswith(TIMM):
        body = _of_timm(asked.model.source.removeprefix(TIMM))
        return body, seen_by_timm(cast(Any, body).pretrained_cfg)
    try:
        return _of_transformers(asked), _seen_by_transformers(asked)
    except ModelError as error:
        raise ModelError(f"{error}{_torchvision_trouble()}") from error


def _of_transformers(asked: Asked) -> nn.Module:
    asked.model.refuse_yolo()
    try:
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig
    except ImportError as error:
        message = f'transformers is needed to load {asked.model.name}: pip install "smidgen[vision]"'
        raise MissingDependency(message + _torchvision_trouble()) from error
    try:
        config = AutoConfig.from_pretrained(asked.model.source, revision=asked.revision or "main")
    except Exception as error:
        raise ModelError(f"{asked.model.name} cannot be loaded: {first_line(error)}") from error
    classifies = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kind = "AutoModelForImageClassification" if classifies else "AutoModel"
    return load_body(asked.model, asked.dtype, asked.revision, kind=kind)


def _of_timm(name: str) -> nn.Module:
    try:
        timm: Any = import_module("timm")  # no type information, and not in the environment
    except ImportError as error:
        raise MissingDependency(
            f"timm is needed to load {TIMM}{name}: pip install timm{_torchvision_trouble()}"
        ) from error
    except Exception as error:
        raise ModelError(f"timm cannot be imported: {first_line(error)}{_torchvision_trouble()}") from error
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=True))
    except Exception as error:
        raise ModelError(f"timm cannot make {name}: {first_line(error)}") from error


def _torchvision_trouble() -> str:
    """A sentence, if the torchvision that is installed is broken: transformers and timm import it where it is there."""
    if find_spec("torchvision") is None:
        return ""
    try:
        import_module("torchvision")
    except Exception as error:
        return (
            f". The torchvision that is installed does not fit torch {torch.__version__} ({first_line(error)}), and it "
            "is imported wherever it is there: install the one for this torch, or `pip uninstall torchvision`; smidgen "
            "does without"
        )
    return ""


def _seen_by_transformers(asked: Asked) -> Seen:
    """From the model's image processor.  None of its code is run, so torchvision is not needed."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(asked.model.source, revision=asked.revision)
    except Exception:  # OSError for a folder without the file; others of the hub
        return seen_by_timm({})
    return seen_by_processor(said)


class Tap:
    """Hands out what a module was last given."""

    def __init__(self) -> None:
        self.given: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.given = inputs[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"given": None}  # a copy has seen nothing

    def take(self) -> Tensor:
        assert self.given is not None, "the classifier was not called"
        given, self.given = self.given, None
        return given


class ImageClassifier(TaskModel):
    """A pre-trained body, whose own classifier is passed by, and a linear head in fp32.

    Takes pixels as uint8, or in 0..1.   width: D.   where: the features come from, in words.
    Raises ModelError if the model does not take such images, or gives something else each time.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, outputs: int, seen: Seen, name: str) -> None:
        """name: of the model, for errors."""
        super().__init__()
        self.body = body.eval()
        like = next(body.parameters())
        self.dtype = like.dtype
        for part in ("mean", "std"):
            numbers = torch.tensor(getattr(seen, part), device=like.device).view(1, -1, 1, 1)
            self.register_buffer(part, numbers, persistent=False)
        shape = (2, seen.fit.channels, seen.fit.height, seen.fit.width)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(like.device)
        self.tap: Tap | None = None
        self.where = "what comes out of it, pooled: it ends in no linear layer"
        try:
            if path := classifier_of(body, pixels.to(self.dtype)):
                self.tap = Tap()
                body.get_submodule(path).register_forward_pre_hook(self.tap)
                self.where = f"what its classifier {path} is given"
            with torch.no_grad():
                features, again = self.features({"pixels": pixels}), self.features({"pixels": pixels})
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{name} fails on a batch {shape} of images: {first_line(error)}. "
                "Say another side with task.image_size, or the channels with task.mean and task.std"
            ) from error
        if not torch.equal(features, again):
            raise ModelError(f"{name} gives something else each time for the same images: it masks or draws at random")
        self.head: nn.Linear = nn.Linear(features.shape[1], outputs, device=like.device)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        train_adapted_norms(self.body, mode)
        return self

    def features(self, batch: Batch) -> Tensor:
        pixels = batch["pixels"]
        if not pixels.is_floating_point():
            pixels = pixels.float() / 255
        out = self.body(((pixels - self.mean) / self.std).to(self.dtype))
        return pooled(self.tap.take() if self.tap else outputs_of(out)).float()

    def forward(self, batch: Batch) -> Tensor:
        return cast(Tensor, self.head(self.features(batch)))


@torch.no_grad()
def classifier_of(body: nn.Module, pixels: Tensor) -> str | None:
    """The path of the linear layer whose output the model gives, or makes its probabilities of; None if there is none.

    pixels: a batch that is tried.
    """
    given: dict[str, Tensor] = {}

    def noted(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            given.pop(path, None)  # the last call counts
            given[path] = output

        return note

    linears = [(path, module) for path, module in modules_of(body) if isinstance(module, nn.Linear) and path]
    handles = [module.register_forward_hook(noted(path)) for path, module in linears]
    try:
        out = outputs_of(body(pixels))
    finally:
        for handle in handles:
            handle.remove()
    return next((path for path, y in reversed(given.items()) if y.shape == out.shape and _makes(y, out)), None)


def _makes(y: Tensor, out: Tensor) -> bool:
    """True if y comes out as it is, as probabilities, or as their logarithms."""
    made = (y, y.softmax(-1), y.log_softmax(-1), y.sigmoid(), nn.functional.logsigmoid(y))
    return any(torch.allclose(z, out, atol=1e-6) for z in made)


def outputs_of(out: Any) -> Tensor:
    """The tensor that a model of images gives: itself, logits, what it pooled, or its last hidden states.

    Raises ModelError.
    """
    if isinstance(out, tuple | list) and out:
        out = out[0]
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if not isinstance(out, Tensor) and getattr(out, name, None) is not None:
            out = getattr(out, name)
    if not isinstance(out, Tensor):
        raise ModelError(f"a model of images is to give a tensor, and this gives {type(out).__name__}")
    return out


def pooled(out: Tensor) -> Tensor:
    """(N, D): as it is; the mean over places of (N, D, H, W), over tokens of (N, T, D).  Raises ModelError."""
    if out.ndim == 4:
        return out.mean((2, 3))
    if out.ndim == 3:
        return out.mean(1)
    if out.ndim != 2:
        raise ModelError(f"a model of images is to give features (N, D), and this gives {tuple(out.shape)}")
    return out
