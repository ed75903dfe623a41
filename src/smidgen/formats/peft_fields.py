"""The fields of Hugging Face PEFT's `adapter_config.json` by peft_type, with their defaults.

Data from peft 0.21.2, whose `save_pretrained` writes all of them.  A test compares it with the installed package.
"""

from typing import Any

VERSION = "0.21.2"

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_type": None,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
}

TARGETS: dict[str, Any] = {"exclude_modules": None, "target_modules": None}

PROMPTS: dict[str, Any] = {
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}

FIELDS: dict[str, dict[str, Any]] = {
    "LORA": COMMON
    | TARGETS
    | {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    },
    "IA3": COMMON
    | TARGETS
    | {
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
    },
    "PREFIX_TUNING": COMMON
    | PROMPTS
    | {
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    },
    "PROMPT_TUNING": COMMON
    | PROMPTS
    | {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
}

# Fields that choose places, describe, or set the start of training: what they say is in the tensors already.
WITHOUT_EFFECT = frozenset(
    {
        *COMMON,
        *TARGETS,
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
