"""RandLoRA in Hugging Face PEFT's folder: as declared, but 0.21.2 writes the shared matrices again for every layer."""

from .layout import PREFIX
from .peft_declared import DeclaredTranslation


class RandLoRATranslation(DeclaredTranslation):
    """Reads a file with the shared matrices at the top, and with copies of them under each layer; writes the first."""

    def repeats(self, key: str) -> str | None:
        name = key.rpartition(".")[2]
        return f"base_model.{name}" if key.startswith(PREFIX) and name in ("randlora_A", "randlora_B") else None
