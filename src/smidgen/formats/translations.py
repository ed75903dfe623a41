"""Which methods Hugging Face PEFT has, and the translation of each."""

from typing import Any

from ..core.errors import FolderError
from ..core.method import Method, methods
from .peft_ia3 import IA3Translation
from .peft_lora import LoRATranslation
from .peft_prompts import PrefixTranslation, PromptTranslation
from .translation import PeftTranslation, Translation

_TRANSLATIONS: dict[str, PeftTranslation] = {
    "ia3": IA3Translation(),
    "lora": LoRATranslation(),
    "prefix_tuning": PrefixTranslation(),
    "prompt_tuning": PromptTranslation(),
}
_OURS = Translation()


def translation_of(method: type[Method]) -> Translation:
    """How a method is written and read."""
    return _TRANSLATIONS.get(method.name, _OURS)


def peft_method(peft_type: Any) -> tuple[type[Method], PeftTranslation]:
    """The method that HF PEFT means by this peft_type.  Raises FolderError naming those that are read."""
    for name, translation in _TRANSLATIONS.items():
        if translation.peft_type == peft_type:
            return methods()[name], translation
    known = ", ".join(translation.peft_type for translation in _TRANSLATIONS.values())
    raise FolderError(f"peft_type is {str(peft_type)[:80]!r}. Of Hugging Face PEFT's methods these are read: {known}")
