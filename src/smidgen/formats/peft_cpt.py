"""CPT in Hugging Face PEFT's folder: the vectors (N, E) of the whole context, as they are after training."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.cpt import CPT, Context
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .peft_prompt_tuning import PromptTuningTranslation
from .peft_prompts import KEY, length_of
from .translation import Found, Shapes, number

_NUMBERS = {
    "epsilon": "opt_projection_epsilon",
    "format_epsilon": "opt_projection_format_epsilon",
    "decay": "opt_loss_decay_factor",
}


class CPTTranslation(PromptTuningTranslation):
    """A context in front of a language model."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        method = cast(CPT, method)
        return {
            **super().fields(modules, method, sites),
            **{theirs: getattr(method, ours) for ours, theirs in _NUMBERS.items()},
            "cpt_token_ids": list(method.token_ids),
            "cpt_tokens_type_mask": list(method.token_types),
            "cpt_mask": [1] * method.length,
            "opt_weighted_loss_type": "none" if method.decay == 1 else "decay",
        }

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        method = cast(CPT, method)
        rows = [row for row, kind in enumerate(method.token_types) if kind % 4]

        def whole(held: Sequence[Tensor]) -> Tensor:
            (prompt,) = held
            if prompt.is_meta:
                return prompt.new_empty(method.length, prompt.shape[1])
            context = Context(method, sites[0]).to(prompt.device)
            context.prepare()
            context.prompt.data = prompt
            return cast(Tensor, context()).detach()

        return [Stored(KEY, ((sites[0].name, "shared.prompt"),), whole, lambda tensor: (tensor[rows],))]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        # cpt_mask is in the config alone: HF PEFT computes nothing with it
        own = {"cpt_token_ids", "cpt_tokens_type_mask", "cpt_mask", "opt_weighted_loss_type", *_NUMBERS.values()}
        length = length_of(config, PROMPTS | own)
        settings: dict[str, Any] = {ours: number(config, theirs) for ours, theirs in _NUMBERS.items()}
        if config.get("opt_weighted_loss_type", "none") != "decay":
            settings["decay"] = 1.0
        for ours, theirs in {"token_ids": "cpt_token_ids", "token_types": "cpt_tokens_type_mask"}.items():
            value = config.get(theirs)
            if not isinstance(value, list) or len(value) != length or not all(type(n) is int for n in value):
                raise FolderError(f"{theirs} is {str(value)[:80]!r}, not {length} whole numbers")
            settings[ours] = tuple(value)
        return Found(settings, CPT(**settings).resolve(modules.model).sites)
