"""P-tuning in Hugging Face PEFT's folder: the prompt that the network computes; the network itself is not kept there.

We write the network beside it, so that what we saved can be trained on.  What HF PEFT saved is a plain prompt here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from ..core.method import Method
from ..core.site import Site
from ..methods.p_tuning import PTuning
from .layout import Modules, Stored, Tensors
from .peft_prompt_tuning import PromptTuningTranslation, doubled, submodules
from .peft_prompts import KEY, result_of, stored_with_result


class PTuningTranslation(PromptTuningTranslation):
    """A prompt, and the network that makes it."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        found, method = super().fields(modules, method, sites), cast(PTuning, method)
        if method.encoder is None:
            return found
        width = method.width or sites[0].fan_out
        named = {"encoder_reparameterization_type": method.encoder.upper(), "encoder_hidden_size": width}
        return {**found, **named, "encoder_num_layers": method.layers}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        if cast(PTuning, method).encoder is None:
            return super().stored_peft(method, sites, tensors)
        at, names = sites[0].name, list(tensors[sites[0].name])
        result = result_of(method, sites, names)

        def made(held: Mapping[tuple[str, str], Tensor]) -> Tensor:
            prompt = result([held[at, name] for name in names])
            return doubled([prompt]) if submodules(sites) == 2 else prompt

        return stored_with_result(KEY, method, sites, tensors, made)

    def read_fields(self) -> frozenset[str]:
        network = ("dropout", "hidden_size", "num_layers", "reparameterization_type")  # how it was trained
        return super().read_fields() | {f"encoder_{name}" for name in network}

    def found(self, config: Mapping[str, Any], length: int) -> dict[str, Any]:
        return {"length": length, "encoder": None}
