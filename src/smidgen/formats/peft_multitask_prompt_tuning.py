"""Multitask prompt tuning in Hugging Face PEFT's folder: three tensors at the top.

Of encoder-decoders HF PEFT has a second prompt in front of the decoder while training and leaves it out in `generate`
(num_transformer_submodules 2); what is read and written is the prompt of the encoder alone (1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .peft_prompt_tuning import PromptTuningTranslation
from .peft_prompts import KEY, length_of
from .translation import Found, Shapes, number


class MultitaskPromptTuningTranslation(PromptTuningTranslation):
    """A shared prompt and the products of the tasks."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if method.settings()["task"] is not None:
            return "HF PEFT has no task of calls that name none (task)"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        settings = method.settings()
        own = {"num_tasks": settings["tasks"], "num_ranks": settings["rank"], "num_transformer_submodules": 1}
        return super().fields(modules, method, sites) | own

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        names = {"prompt": KEY, "U": "prefix_task_cols", "V": "prefix_task_rows"}
        return [Stored(key, ((sites[0].name, f"shared.{name}"),)) for name, key in names.items()]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        if config.get("num_transformer_submodules") == 2:
            raise FolderError(
                "num_transformer_submodules is 2: HF PEFT puts the decoder's half in front while training, and "
                "leaves it out when it generates. Train with 1"
            )
        start = {f"prompt_tuning_init_{what}" for what in ("state_dict_path", "task")}
        length = length_of(config, PROMPTS | {"num_tasks", "num_ranks", *start})
        tasks, rank = (number(config, name, whole=True) for name in ("num_tasks", "num_ranks"))
        settings = {"length": length, "tasks": tasks, "rank": rank}
        return Found(settings, self.method(**settings).resolve(modules.model).sites)
