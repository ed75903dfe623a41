"""DiskNames: what a method's fields and tensors are called in an adapter folder.  Data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DiskNames:
    """Names on disk, Hugging Face PEFT's where it has the method.

    peft_type: the value of "peft_type"; "SMIDGEN_<NAME>" where HF PEFT has no such method.
    fields: our field -> the key in adapter_config.json.   Fields not named here keep their own name.
    tensors: our parameter -> the suffix after the module path in adapter_model.safetensors.  Not named: its own name.
        Those of `shared` are called "shared.X" and stand at the top: base_model.<suffix>.
    kinds: names of the layer kinds that HF PEFT has the method for; elsewhere our own layout is written.
    ignored: fields of HF PEFT's that only set the start of training, or say where or how to save.
    fixed: other fields of HF PEFT's, with the value that says what we do; a folder with another value is refused.
    """

    peft_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("linear", "conv1d-transposed")
    ignored: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """True if HF PEFT knows the method, so that its folders are read and written."""
        return not self.peft_type.startswith("SMIDGEN_")
