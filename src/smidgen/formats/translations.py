"""Which methods Hugging Face PEFT has, and the translation of each.

`peft_<method>.py` in this folder, with a class `<Method>Translation`, if there is one; else what the method's `disk`
declares.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method, methods
from .peft_declared import DeclaredTranslation
from .translation import PeftTranslation, Translation, otherwise


def translation_of(method: type[Method]) -> Translation:
    """How a method is written and read."""
    if not method.disk.foreign:
        return Translation()
    own = f"{__package__}.peft_{method.name}"
    if method.__module__.startswith("smidgen.") and find_spec(own):
        translation: Translation = getattr(import_module(own), f"{method.__name__}Translation")(method)
        return translation
    return DeclaredTranslation(method)


def peft_method(config: Mapping[str, Any]) -> tuple[type[Method], PeftTranslation]:
    """The method that HF PEFT means by this config.  Raises FolderError naming those that are read.

    Several methods may share a peft_type, as LoRA's variants do: it is the one most of whose `disk.fixed` the config
    has, and all.
    """
    peft_type = config.get("peft_type")
    foreign = [method for method in methods().values() if method.disk.foreign]
    fitting = [m for m in foreign if m.disk.peft_type == peft_type and not otherwise(config, m.disk.fixed)]
    if not fitting:
        fitting = [m for m in foreign if m.disk.peft_type == peft_type and m.name == str(peft_type).lower()]
    if not fitting:
        known = ", ".join(sorted({method.disk.peft_type for method in foreign}))
        raise FolderError(
            f"peft_type is {str(peft_type)[:80]!r}. Of Hugging Face PEFT's methods these are read: {known}"
        )
    method = max(fitting, key=lambda method: len(method.disk.fixed))
    translation = translation_of(method)
    assert isinstance(translation, PeftTranslation)
    return method, translation
