"""Tiny causal language models with a byte-pair tokenizer that knows every byte, with or without a chat template."""

from pathlib import Path
from typing import Any

import torch

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def tokenizer_of(template: str | None = CHAT, positions: int = 128) -> Any:
    """Bytes and a few merges.   template: None for none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system hello what is the colour of"] * 3, trainer)
    end = "<|im_end|>" if template else "<|end|>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token="<|end|>", model_max_length=positions
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = template
    return made


def tiny_lm(folder: Path, kind: str = "llama", template: str | None = CHAT, **settings: Any) -> Path:
    """A language model of two layers of 32.   kind: "llama", "gpt2", "gemma2", "granite" or "cohere"."""
    import transformers

    tokenizer = tokenizer_of(template)
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any]
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
        }
    name = {"llama": "Llama", "gpt2": "GPT2", "gemma2": "Gemma2", "granite": "Granite", "cohere": "Cohere"}[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        **sizes,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, f"{name}LMHeadModel" if kind == "gpt2" else f"{name}ForCausalLM")(config).save_pretrained(
            folder
        )
    return folder
