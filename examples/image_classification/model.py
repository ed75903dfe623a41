"""EfficientNet-Lite0, pre-trained on ImageNet-1k (Tan & Le 2019, arXiv:1905.11946), from the file of prepare.py."""

from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import load_file
from torch import nn


def efficientnet_lite0() -> nn.Module:
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(load_file(".cache/image_classification/efficientnet-lite0.safetensors"))
    # its authors': (pixel - 127) / 128
    model.pretrained_cfg = {"input_size": (3, 224, 224), "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return model
