"""The detector of this example: a YOLOv8s of ultralytics (AGPL-3.0), with the weights that prepare.py converted."""

import importlib.metadata
import os
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

HOME = Path(".cache/detection")


def detector() -> nn.Module:
    """A DetectionModel with its classes by name, and the settings that its loss reads."""
    os.environ.setdefault("YOLO_CONFIG_DIR", str(HOME.resolve()))  # else it writes to the home folder
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    version = importlib.metadata.version
    # It asks for torchvision's version when it is imported, and needs torchvision for nothing that is done here.
    importlib.metadata.version = lambda name: version(name) if name != "torchvision" or installed(name) else "0.0.0"
    try:
        from ultralytics.cfg import DEFAULT_CFG
        from ultralytics.nn.tasks import DetectionModel
    finally:
        importlib.metadata.version = version
    model = DetectionModel("yolov8s.yaml", nc=2, verbose=False)
    model.load_state_dict(load_file(HOME / "detector.safetensors"))
    model.names = {0: "standing", 1: "fallen"}
    model.args = DEFAULT_CFG
    return model


def installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))
