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
        why="twenty times full fine-tuning's; 4e-3 was no better in longer runs. Rank 4 on every layer is below 1 %",
    ),
    "dora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's; the magnitudes start at the norms of rows, about 1, and a step of 2e-3 suits them",
    ),
    "adalora": Preset(
        learning_rate=3e-3,
        settings={"rank": 4, "start_rank": 6, "alpha": 32.0, "orthogonality": 0.1},
        why="HF PEFT's alpha of 8 over 12 ranks with singular values that start at 0 learns little in a short run",
    ),
    "qalora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0, "group_size": 16},
        why="not measured: LoRA's; fewer numbers, of which each moves a group of weights",
    ),
    "kasa": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's; the penalties are small beside the loss",
    ),
    "bdlora": Preset(
        learning_rate=2e-3,
        settings={"rank": 6, "alpha": 12.0, "blocks": 2},
        why="not measured: LoRA's, with a rank that gives as many numbers",
    ),
    "lora_fa": Preset(
        learning_rate=5e-3,
        settings={"rank": 8, "alpha": 16.0},
        why="not measured: B alone moves, and has half the numbers, so it may go further than LoRA's",
    ),
    "mtl_lora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's",
    ),
    "alora": Preset(
        learning_rate=2e-3,
        settings={"rank": 8, "alpha": 16.0},
        why="not measured: LoRA's; the authors take larger ranks, since less of each row is changed",
    ),
    "velora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's; AdamW does not mind that a compressed gradient is smaller",
    ),
    "bottleneck": Preset(
        learning_rate=5e-3,
        why="at 1e-3 a short run moves it too little; more places or a place beside the layer brought nothing",
    ),
    "ia3": Preset(
        learning_rate=3e-2,
        weight_decay=0.0,
        why="a few scales per layer have to move far; decay would pull them to 0, and the base is at 1",
    ),
    "bitfit": Preset(learning_rate=5e-3, why="biases have to move further than weights; 1e-2 is too far"),
    "prefix_tuning": Preset(
        learning_rate=1e-1,
        weight_decay=0.0,
        settings={"init_std": 0.5},
        why="a model's keys and values are of size 0.5 to 1: prefixes that start near 0 are all alike, and stay so",
    ),
    "prompt_tuning": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        why="a fifth of the embedding's size a step; vectors of random tokens disturb more at the start",
    ),
    "selective": Preset(
        learning_rate=1e-3,
        settings={"grain": "tensors", "budget": 0.009},
        why="whole tensors learned more than scattered weights in the same steps (.817 against .805)",
    ),
    "loha": Preset(
        learning_rate=5e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: a product of two small products moves little at first, and faster once its factors grow",
    ),
    "lokr": Preset(
        learning_rate=5e-3,
        settings={"rank": 8, "alpha": 8.0},
        why="not measured: each entry of W1 moves a whole block, by a share of W2's small entries",
    ),
    "shira": Preset(
        learning_rate=3e-3,
        settings={"rank": 2},
        why="not measured: one weight in a hundred has to move far; its rank of 32 would be every sixth",
    ),
    "supertuning": Preset(learning_rate=3e-3, why="not measured: one weight in a hundred has to move far"),
    "waveft": Preset(
        learning_rate=3e-4,
        weight_decay=0.0,
        settings={"frequencies": 700},
        why="not measured: the scale of 25 makes a coefficient move four weights by twelve times its step",
    ),
    "beft": Preset(learning_rate=1e-2, why="not measured: fewer biases than BitFit's have to move further"),
    "ln_tuning": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        why="not measured: few numbers have to move far; decay would pull norms to 0, and the base is at 1",
    ),
    "batchnorm_tuning": Preset(
        learning_rate=1e-2, weight_decay=0.0, why="not measured: few numbers, one or two per channel, have to move far"
    ),
    "ssf": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        why="not measured: few numbers have to move far; decay would pull scales to 0, and the base is at 1",
    ),
    "diff_pruning": Preset(
        learning_rate=5e-4,
        why="not measured: every weight moves until most are pruned, so nearer to full fine-tuning's rate",
    ),
    "head": Preset(learning_rate=1e-4, why="not measured: modules of the model trained whole, as in full fine-tuning"),
    "full": Preset(learning_rate=1e-4, why="short runs want twice the usual rate, and a head that moves faster"),
}


def preset(method: str) -> Preset:
    """The preset of a method; of a method unknown here, a careful middle."""
    return _PRESETS.get(method, Preset(learning_rate=1e-3, why="no preset for this method: a careful middle"))
