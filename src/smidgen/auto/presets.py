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


PRESETS: dict[str, Preset] = {
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
        learning_rate=1e-2,
        head_learning_rate=3e-4,
        settings={"rank": 4, "start_rank": 6, "alpha": 32.0, "orthogonality": 0.1},
        why="of four rates on validation rows: .826 against .804 at a third of it; the singular values start "
        "at 0 and move far",
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
        learning_rate=1e-3,
        settings={"rank": 8, "alpha": 16.0},
        why="5e-3 gained nothing over the probe in 100 steps, 1e-3 a point in one run",
    ),
    "lora_rows": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's",
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
    "monteclora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's; the samples are 1e-4 of a standard deviation and hardly disturb",
    ),
    "arrow": Preset(
        learning_rate=1e-3,
        settings={"rank": 4, "experts": ("0", "1"), "top_k": 1, "train_experts": True},
        why="not measured: Arrow is made of trained experts; by itself it can only train fresh ones",
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
    "bitfit": Preset(
        learning_rate=5e-4,
        head_learning_rate=3e-4,
        why="of four on validation rows, the lowest loss (.417 against .436 at 2e-3); a slow head leaves the "
        "probe intact",
    ),
    "prefix_tuning": Preset(
        learning_rate=1e-1,
        weight_decay=0.0,
        settings={"init_std": 0.5},
        why="a model's keys and values are of size 0.5 to 1: prefixes that start near 0 are all alike, and stay so",
    ),
    "prompt_tuning": Preset(
        learning_rate=3e-2,
        weight_decay=0.0,
        why="of four on validation rows: .832 against .816 at 1e-1",
    ),
    "p_tuning": Preset(
        learning_rate=3e-3,
        head_learning_rate=3e-4,
        weight_decay=0.0,
        why=".826 on validation rows; a step of the network moves the whole prompt",
    ),
    "multitask_prompt_tuning": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        why="not measured: prompt tuning's; decay would pull the products, which are at 1, to 0",
    ),
    "cpt": Preset(
        learning_rate=1e-3,
        weight_decay=0.0,
        why="not measured: tokens may move a tenth of the embedding's scale at most, so steps are small",
    ),
    "cartridge": Preset(
        learning_rate=5e-3,
        weight_decay=0.0,
        why="of three on validation rows: .824, the authors' 2e-2 lost; it starts from a text's own keys and values",
    ),
    "adaption_prompt": Preset(
        learning_rate=1e-2,
        head_learning_rate=3e-4,
        weight_decay=0.0,
        why="of four on validation rows: .810 against .804 with a faster head; gates start at 0 and have to move far",
    ),
    "llama_adapter_v2": Preset(
        learning_rate=5e-3,
        weight_decay=0.0,
        why="not measured: biases' rate; decay would pull the scales, which are at 1, to 0",
    ),
    "vpt": Preset(
        learning_rate=5e-2,
        weight_decay=0.0,
        why="not measured: the authors search 0.25 to 50 with SGD; with AdamW a tenth of a prompt's size a step",
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
        learning_rate=2e-3,
        settings={"rank": 8, "alpha": 8.0},
        why="of three on validation rows: .812 against .808; each entry of W1 moves a whole block",
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
        learning_rate=1e-3,
        head_learning_rate=3e-4,
        weight_decay=0.0,
        why="of four on validation rows: .820 against .806 and below; decay would pull norms to 0, and the "
        "base is at 1",
    ),
    "batchnorm_tuning": Preset(
        learning_rate=3e-3,
        weight_decay=0.0,
        why="a CNN on pictures of clothes: 1e-2 lost 14 points in two steps, 3e-3 gained one over the probe",
    ),
    "ssf": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        why="not measured: few numbers have to move far; decay would pull scales to 0, and the base is at 1",
    ),
    "diff_pruning": Preset(
        learning_rate=2e-4,
        why="of three on validation rows; every weight moves until most are pruned",
    ),
    "oft": Preset(
        learning_rate=2e-3,
        weight_decay=0.0,
        settings={"block_size": 8},
        why="not measured: the numbers are angles, which add up over a block; blocks of 8 are below 1 %",
    ),
    "hra": Preset(
        learning_rate=5e-3,
        weight_decay=0.0,
        settings={"rank": 4},
        why="not measured: the vectors start a third wide per entry, and only their directions count",
    ),
    "boft": Preset(
        learning_rate=3e-3,
        weight_decay=0.0,
        why="not measured: angles of blocks of 4; decay would pull the scales to 0, and the base is at 1",
    ),
    "road": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        settings={"group_size": 32},
        why="not measured: one angle and scale per pair have to move as far as IA3's, but turn as well",
    ),
    "psoft": Preset(
        learning_rate=3e-3,
        weight_decay=0.0,
        why="not measured: angles between 32 directions; decay would pull the scales to 0, and the base is at 1",
    ),
    "miss": Preset(
        learning_rate=1e-3,
        settings={"rank": 8},
        why="not measured: half of LoRA's rate, as all shards of the input move an output together",
    ),
    "gralora": Preset(
        learning_rate=2e-3,
        settings={"rank": 4, "alpha": 8.0},
        why="not measured: LoRA's, of as many parameters",
    ),
    "osf": Preset(
        learning_rate=1e-4,
        weight_decay=0.0,
        why="not measured: full fine-tuning's, as half of every weight trains; decay would pull away from the base",
    ),
    "c3a": Preset(
        learning_rate=1e-1,
        weight_decay=0.0,
        settings={"block_size": 128},
        why="not measured: what is learned is divided by the fan-in, some hundreds, before it is added",
    ),
    "vera": Preset(
        learning_rate=2e-2,
        weight_decay=0.0,
        settings={"rank": 128},
        why="not measured: b starts at 0 and a b of 1 changes a weight by a fifth of its size",
    ),
    "pvera": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        settings={"rank": 128},
        why="not measured: as VeRA, at half the rate for its noise",
    ),
    "randlora": Preset(
        learning_rate=2e-4,
        weight_decay=0.0,
        why="not measured: hundreds of random products add up at a scale of 20, so 1e-4 of each is a noticeable change",
    ),
    "delora": Preset(
        learning_rate=1e-3,
        settings={"bound": 4.0},
        why="5e-3 gained nothing over the probe in 100 steps, 1e-3 two points in one run",
    ),
    "hira": Preset(
        learning_rate=1e-2,
        settings={"rank": 8},
        why="not measured: B A multiplies the weight, so it has to reach tenths, where LoRA's has to reach hundredths",
    ),
    "vblora": Preset(
        learning_rate=5e-3,
        weight_decay=0.0,
        settings={"vectors": 90, "vector_length": 128},
        why="not measured: between the authors' 1e-3 for the bank and 1e-2 for logits; 128 divides common widths",
    ),
    "unilora": Preset(
        learning_rate=1e-2,
        weight_decay=0.0,
        settings={"length": 16384},
        why="not measured: ten matrix entries to a number; of 256 numbers each would have to move far more",
    ),
    "tinylora": Preset(
        learning_rate=5e-3,
        head_learning_rate=3e-4,
        weight_decay=0.0,
        settings={"rank": 8},
        why="of three on validation rows: .822 against .816 at 2e-3; singular values are of size 1 to 10",
    ),
    "lily": Preset(
        learning_rate=2e-3,
        settings={"rank": 8, "stride": 2, "experts": 3},
        why="not measured: LoRA's rate; shared halves afford a higher rank",
    ),
    "loreft": Preset(
        learning_rate=4e-3,
        weight_decay=0.0,
        settings={"positions": "all"},
        why="not measured: the authors' 4e-4 to 9e-4 are for long runs; a head that reads the mean wants all tokens",
    ),
    "noreft": Preset(
        learning_rate=4e-3, weight_decay=0.0, settings={"positions": "all"}, why="not measured: as LoReFT"
    ),
    "direft": Preset(
        learning_rate=4e-3, weight_decay=0.0, settings={"positions": "all"}, why="not measured: as LoReFT"
    ),
    "compacter": Preset(
        learning_rate=3e-3,
        head_learning_rate=3e-4,
        why="of three on validation rows, the lowest loss; a slow head leaves the probe intact",
    ),
    "invertible": Preset(
        learning_rate=3e-4,
        head_learning_rate=3e-4,
        why="of four on validation rows; it changes all that the model reads, so less than a bottleneck",
    ),
    "conv_adapter": Preset(learning_rate=5e-3, why="not measured: a bottleneck's rate, of which it is the kin"),
    "trainable_tokens": Preset(
        learning_rate=1e-3,
        weight_decay=0.0,
        why="not measured: whole rows, which decay would pull to 0; a row moves only in the steps that read it",
    ),
    "xlora": Preset(
        learning_rate=2e-3,
        settings={"train_experts": True, "rank": 4},
        why="not measured: without adapters to mix, fresh experts learn along, at LoRA's rate",
    ),
    "poly": Preset(
        learning_rate=4e-3,
        settings={"rank": 4},
        why="not measured: LoRA's rate, doubled, for its change is scaled by 1 / rank",
    ),
    "glora": Preset(
        learning_rate=3e-4,
        settings={"rank": 4},
        why="of three on validation rows: .812 against .808 at 1e-3; W * A is as large as W at A of size 1",
    ),
    "peanut": Preset(
        learning_rate=2e-3,
        settings={"rank": 16},
        why="not measured: the rate of LoRA, whose B it has, behind a network",
    ),
    "deft": Preset(
        learning_rate=5e-3,
        settings={"rank": 4},
        why="not measured: P starts at 0.02, so what is put in acts a fiftieth as strongly as in LoRA",
    ),
    "frod": Preset(
        learning_rate=5e-4,
        weight_decay=0.0,
        why="of two on validation rows: .820; scales l start at their size in W, and decay would pull them to 0",
    ),
    "adamss": Preset(
        learning_rate=1e-2,
        why="not measured: one direction for each of five clusters has to move far",
    ),
    "shadow": Preset(
        learning_rate=1e-3, settings={"alpha": 0.5}, why="not measured: a whole small model trains, at a usual rate"
    ),
    "fourierft": Preset(
        learning_rate=3e-2,
        weight_decay=0.0,
        settings={"frequencies": 1000, "scale": 300.0},
        why="not measured: one coefficient moves a weight by 300 / (I O) of its size",
    ),
    "head": Preset(learning_rate=1e-4, why="not measured: modules of the model trained whole, as in full fine-tuning"),
    "full": Preset(learning_rate=1e-4, why="short runs want twice the usual rate, and a head that moves faster"),
}


def preset(method: str) -> Preset:
    """The preset of a method; of a method unknown here, a careful middle."""
    return PRESETS.get(method, Preset(learning_rate=1e-3, why="no preset for this method: a careful middle"))
