"""smidgen: parameter-efficient fine-tuning of any PyTorch model.

    adapters = smidgen.attach(model, LoRA(rank=16, targets=Targets("*.q_proj", "*.v_proj")), name="style")
    ...train adapters.parameters() in any loop...
    adapters.save("out/style")

`smidgen tune --model M --data D` does all of it in one command.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdapterSet as AdapterSet
    from .adapters import adapters_of as adapters_of
    from .adapters import attach as attach
    from .adapters import load as load
    from .conversion import to_lora as to_lora
    from .core.composition import Rows as Rows
    from .core.composition import Stack as Stack
    from .core.composition import Weighted as Weighted
    from .core.errors import SmidgenError as SmidgenError
    from .core.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .core.quantise import quantise as quantise
    from .core.recompute import recompute as recompute
    from .core.targets import Targets as Targets
    from .methods.adalora import AdaLoRA as AdaLoRA
    from .methods.adamss import AdaMSS as AdaMSS
    from .methods.adaption_prompt import AdaptionPrompt as AdaptionPrompt
    from .methods.alora import ALoRA as ALoRA
    from .methods.arrow import Arrow as Arrow
    from .methods.batchnorm_tuning import BatchNormTuning as BatchNormTuning
    from .methods.bdlora import BDLoRA as BDLoRA
    from .methods.beft import BEFT as BEFT
    from .methods.bitfit import BitFit as BitFit
    from .methods.boft import BOFT as BOFT
    from .methods.bottleneck import Bottleneck as Bottleneck
    from .methods.c3a import C3A as C3A
    from .methods.cartridge import Cartridge as Cartridge
    from .methods.compacter import Compacter as Compacter
    from .methods.conv_adapter import ConvAdapter as ConvAdapter
    from .methods.cpt import CPT as CPT
    from .methods.deft import DEFT as DEFT
    from .methods.delora import DeLoRA as DeLoRA
    from .methods.diff_pruning import DiffPruning as DiffPruning
    from .methods.direft import DiReFT as DiReFT
    from .methods.dora import DoRA as DoRA
    from .methods.fourierft import FourierFT as FourierFT
    from .methods.frod import FRoD as FRoD
    from .methods.glora import GLoRA as GLoRA
    from .methods.gralora import GraLoRA as GraLoRA
    from .methods.head import Head as Head
    from .methods.hira import HiRA as HiRA
    from .methods.hra import HRA as HRA
    from .methods.ia3 import IA3 as IA3
    from .methods.invertible import Invertible as Invertible
    from .methods.kasa import KaSA as KaSA
    from .methods.lily import Lily as Lily
    from .methods.llama_adapter_v2 import LLaMAAdapterV2 as LLaMAAdapterV2
    from .methods.ln_tuning import LNTuning as LNTuning
    from .methods.loha import LoHa as LoHa
    from .methods.lokr import LoKr as LoKr
    from .methods.lora import LoRA as LoRA
    from .methods.lora_fa import LoRAFA as LoRAFA
    from .methods.lora_rows import LoRARows as LoRARows
    from .methods.loreft import LoReFT as LoReFT
    from .methods.miss import MiSS as MiSS
    from .methods.monteclora import MonteCLoRA as MonteCLoRA
    from .methods.mtl_lora import MTLLoRA as MTLLoRA
    from .methods.multitask_prompt_tuning import MultitaskPromptTuning as MultitaskPromptTuning
    from .methods.noreft import NoReFT as NoReFT
    from .methods.oft import OFT as OFT
    from .methods.osf import OSF as OSF
    from .methods.p_tuning import PTuning as PTuning
    from .methods.peanut import PEANuT as PEANuT
    from .methods.poly import Poly as Poly
    from .methods.prefix_tuning import PrefixTuning as PrefixTuning
    from .methods.prompt_tuning import PromptTuning as PromptTuning
    from .methods.psoft import PSOFT as PSOFT
    from .methods.pvera import PVeRA as PVeRA
    from .methods.qalora import QALoRA as QALoRA
    from .methods.randlora import RandLoRA as RandLoRA
    from .methods.road import RoAd as RoAd
    from .methods.selective import Selective as Selective
    from .methods.shadow import Shadow as Shadow
    from .methods.shira import SHiRA as SHiRA
    from .methods.ssf import SSF as SSF
    from .methods.supertuning import SuperTuning as SuperTuning
    from .methods.tinylora import TinyLoRA as TinyLoRA
    from .methods.trainable_tokens import TrainableTokens as TrainableTokens
    from .methods.unilora import UniLoRA as UniLoRA
    from .methods.vblora import VBLoRA as VBLoRA
    from .methods.velora import VeLoRA as VeLoRA
    from .methods.vera import VeRA as VeRA
    from .methods.vpt import VisualPromptTuning as VisualPromptTuning
    from .methods.waveft import WaveFT as WaveFT
    from .methods.xlora import XLoRA as XLoRA

__version__ = "0.1.0"

# where each public name is; it is imported when it is first used, so that `import smidgen` waits for nothing
_PLACES = {
    "ALoRA": "methods.alora",
    "AdaLoRA": "methods.adalora",
    "AdaMSS": "methods.adamss",
    "AdapterSet": "adapters",
    "AdaptionPrompt": "methods.adaption_prompt",
    "Arrow": "methods.arrow",
    "BDLoRA": "methods.bdlora",
    "BEFT": "methods.beft",
    "BOFT": "methods.boft",
    "BatchNormTuning": "methods.batchnorm_tuning",
    "BitFit": "methods.bitfit",
    "Bottleneck": "methods.bottleneck",
    "C3A": "methods.c3a",
    "CPT": "methods.cpt",
    "Cartridge": "methods.cartridge",
    "Compacter": "methods.compacter",
    "ConvAdapter": "methods.conv_adapter",
    "DEFT": "methods.deft",
    "DeLoRA": "methods.delora",
    "DiReFT": "methods.direft",
    "DiffPruning": "methods.diff_pruning",
    "DoRA": "methods.dora",
    "FRoD": "methods.frod",
    "FourierFT": "methods.fourierft",
    "GLoRA": "methods.glora",
    "GraLoRA": "methods.gralora",
    "HRA": "methods.hra",
    "Head": "methods.head",
    "HiRA": "methods.hira",
    "IA3": "methods.ia3",
    "Invertible": "methods.invertible",
    "KaSA": "methods.kasa",
    "LLaMAAdapterV2": "methods.llama_adapter_v2",
    "LNTuning": "methods.ln_tuning",
    "Lily": "methods.lily",
    "LoHa": "methods.loha",
    "LoKr": "methods.lokr",
    "LoRA": "methods.lora",
    "LoRAFA": "methods.lora_fa",
    "LoRARows": "methods.lora_rows",
    "LoReFT": "methods.loreft",
    "MTLLoRA": "methods.mtl_lora",
    "MiSS": "methods.miss",
    "MonteCLoRA": "methods.monteclora",
    "MultitaskPromptTuning": "methods.multitask_prompt_tuning",
    "NoReFT": "methods.noreft",
    "OFT": "methods.oft",
    "OSF": "methods.osf",
    "PEANuT": "methods.peanut",
    "PSOFT": "methods.psoft",
    "PTuning": "methods.p_tuning",
    "PVeRA": "methods.pvera",
    "Poly": "methods.poly",
    "PrefixTuning": "methods.prefix_tuning",
    "PromptTuning": "methods.prompt_tuning",
    "QALoRA": "methods.qalora",
    "RandLoRA": "methods.randlora",
    "RoAd": "methods.road",
    "Rows": "core.composition",
    "SHiRA": "methods.shira",
    "SSF": "methods.ssf",
    "Selective": "methods.selective",
    "Shadow": "methods.shadow",
    "SmidgenError": "core.errors",
    "Stack": "core.composition",
    "SuperTuning": "methods.supertuning",
    "Targets": "core.targets",
    "TinyLoRA": "methods.tinylora",
    "TrainableTokens": "methods.trainable_tokens",
    "UniLoRA": "methods.unilora",
    "VBLoRA": "methods.vblora",
    "VeLoRA": "methods.velora",
    "VeRA": "methods.vera",
    "VisualPromptTuning": "methods.vpt",
    "WaveFT": "methods.waveft",
    "Weighted": "core.composition",
    "XLoRA": "methods.xlora",
    "adapters_of": "adapters",
    "attach": "adapters",
    "linear_cross_entropy": "core.linear_cross_entropy",
    "load": "adapters",
    "quantise": "core.quantise",
    "recompute": "core.recompute",
    "to_lora": "conversion",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
