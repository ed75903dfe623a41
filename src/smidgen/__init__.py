"""smidgen: parameter-efficient fine-tuning of any PyTorch model."""

from .adapters import AdapterSet, adapters_of, attach
from .core.composition import Rows, Stack, Weighted
from .core.errors import SmidgenError
from .core.targets import Targets
from .methods.head import Head
from .methods.lora import LoRA

__version__ = "0.1.0"
__all__ = [
    "AdapterSet",
    "Head",
    "LoRA",
    "Rows",
    "SmidgenError",
    "Stack",
    "Targets",
    "Weighted",
    "adapters_of",
    "attach",
]
