"""What each method needs to learn where nobody says anything: learning rates and settings, found by measurement.

`benchmarks/presets.py` runs every preset on the demo's data and prints what it came to.  HF PEFT's one learning rate
for all methods leaves prompt, prefix and norm tuning at or near chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults of one method for a run.

    learning_rate: peak, of the adapter's parameters.   head_learning_rate: of the task's new head.
    epochs: at most; early stopping and the time may end sooner.   settings: fields of the method.   why: in words.
    """

    learning_rate: float
    head_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    epochs: float = 3.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = "measured on text classification"


_PRESETS: dict[str, Preset] = {
    "lora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="ten times full fine-tuning's or more, whatever the rank, is best for LoRA",
    ),
    "bottleneck": Preset(learning_rate=1e-3),
    "ia3": Preset(learning_rate=1e-2, why="a few scales per layer have to move far"),
    "bitfit": Preset(learning_rate=3e-3, why="biases have to move further than weights"),
    "prefix_tuning": Preset(learning_rate=1e-2, why="virtual keys and values start far from anything useful"),
    "prompt_tuning": Preset(learning_rate=1e-2, why="virtual tokens act through all layers, so they have to move far"),
    "selective": Preset(learning_rate=3e-4, why="the model's own weights, near full fine-tuning's rate"),
    "head": Preset(learning_rate=1e-3),
    "full": Preset(learning_rate=5e-5, head_learning_rate=5e-4, why="the usual rate of full fine-tuning"),
}


def preset(method: str) -> Preset:
    """The preset of a method; of a method unknown here, a careful middle."""
    return _PRESETS.get(method, Preset(learning_rate=1e-3, why="no preset for this method: a careful middle"))
