"""The fields of Hugging Face PEFT's `adapter_config.json` by peft_type, with their defaults.

Data from peft 0.21.2, whose `save_pretrained` writes all of them: `peft_fields.json`, made by `tools/peft_fields.py`.
"""

import json
from pathlib import Path
from typing import Any

FIELDS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("peft_fields.json").read_text())

COMMON = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "peft_version"),
        *("revision", "task_type"),
    }
)

# of what a prompt is for; its own size says the same
PROMPTS = frozenset(
    {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
)

# Fields that choose places, describe, or set the start of training: what they say is in the tensors already.
WITHOUT_EFFECT = frozenset(
    {
        *COMMON,
        "bias",  # trained biases are in the file
        "exclude_modules",
        "target_modules",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",  # the layer itself says how it stores its weight
        "init_ia3_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "qalora_group_size",
        "target_parameters",  # read by LoRA itself
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)

# Starts that leave the base model as it is; others (PiSSA, OLoRA, ...) change it, and the file is a change to that.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")

# End of a model's class name -> HF PEFT's word for its task
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# Modules that HF PEFT expects in the file whenever the task is one of these and the model has them.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
