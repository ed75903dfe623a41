"""Write `src/smidgen/formats/peft_fields.json`: what Hugging Face PEFT's `adapter_config.json` holds, by peft_type.

    python tools/peft_fields.py

Data from the installed package: the fields that `save_pretrained` writes, with their defaults.
"""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

NOT_WRITTEN = {"runtime_config", "_custom_modules"}


def fields_of(config: type) -> dict[str, Any]:
    """The fields of one kind of config with their defaults, as JSON has them."""
    found = {}
    for field in dataclasses.fields(config):
        if field.name in NOT_WRITTEN:
            continue
        made = field.default_factory
        value = made() if made is not dataclasses.MISSING else field.default
        found[field.name] = None if value is dataclasses.MISSING else _json(value)
    found |= {"inference_mode": True, "peft_type": None, "peft_version": peft.__version__}
    return dict(sorted(found.items()))


def _json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    table = {kind.value: fields_of(config) for kind, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items())}
    path = Path(__file__).parent.parent / "src/smidgen/formats/peft_fields.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(table)} types -> {path}")
