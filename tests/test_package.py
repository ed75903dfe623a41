"""What `import smidgen` gives and what it costs."""

import subprocess
import sys

PUBLIC_NAMES = [
    "AdapterSet",
    "BitFit",
    "Bottleneck",
    "Head",
    "IA3",
    "LoRA",
    "PrefixTuning",
    "PromptTuning",
    "Rows",
    "Selective",
    "SmidgenError",
    "Stack",
    "Targets",
    "Weighted",
    "adapters_of",
    "attach",
    "load",
]


def packages_after(statement: str) -> set[str]:
    """The top-level packages, Python's own left out, that a fresh process has imported after `statement`."""
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name for name in run.stdout.split() if name not in sys.stdlib_module_names}


def test_importing_smidgen_imports_no_package_but_torch_and_safetensors():
    assert packages_after("import smidgen") <= packages_after("import torch, safetensors.torch") | {"smidgen"}


def test_the_public_names_are_these_and_no_others():
    import smidgen

    assert sorted(smidgen.__all__) == PUBLIC_NAMES
