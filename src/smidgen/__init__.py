"""smidgen: parameter-efficient fine-tuning of any PyTorch model.

    adapters = smidgen.attach(model, LoRA(rank=16, targets=Targets("*.q_proj", "*.v_proj")), name="style")
    ...train adapters.parameters() in any loop...
    adapters.save("out/style")

`smidgen tune --model M --data D` does all of it in one command.
"""

from .adapters import AdapterSet, adapters_of, attach, load
from .core.composition import Rows, Stack, Weighted
from .core.errors import SmidgenError
from .core.targets import Targets
from .methods.bitfit import BitFit
from .methods.bottleneck import Bottleneck
from .methods.head import Head
from .methods.ia3 import IA3
from .methods.lora import LoRA
from .methods.prefix_tuning import PrefixTuning
from .methods.prompt_tuning import PromptTuning
from .methods.selective import Selective

__version__ = "0.1.0"
__all__ = [
    "IA3",
    "AdapterSet",
    "BitFit",
    "Bottleneck",
    "Head",
    "LoRA",
    "PrefixTuning",
    "PromptTuning",
    "Rows",
    "Selective",
    "SmidgenError",
    "Stack",
    "Targets",
    "Weighted",
    "adapters_of",
    "attach",
    "load",
]
