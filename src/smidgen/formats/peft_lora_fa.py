"""LoRA-FA in Hugging Face PEFT's folder: a plain LoRA, whose A happens not to be trained; our note says so."""

from .peft_lora import LoRATranslation


class LoRAFATranslation(LoRATranslation):
    """As LoRA's."""
