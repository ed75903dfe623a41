"""What `import smidgen` gives and what it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smidgen
from smidgen.core.method import methods

PUBLIC_NAMES = [
    "ALoRA",
    "AdaLoRA",
    "AdaMSS",
    "AdapterSet",
    "AdaptionPrompt",
    "Arrow",
    "BDLoRA",
    "BEFT",
    "BOFT",
    "BatchNormTuning",
    "BitFit",
    "Bottleneck",
    "C3A",
    "CPT",
    "Cartridge",
    "Compacter",
    "ConvAdapter",
    "DEFT",
    "DeLoRA",
    "DiReFT",
    "DiffPruning",
    "DoRA",
    "FRoD",
    "FourierFT",
    "GLoRA",
    "GraLoRA",
    "HRA",
    "Head",
    "HiRA",
    "IA3",
    "Invertible",
    "KaSA",
    "LLaMAAdapterV2",
    "LNTuning",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRARows",
    "LoReFT",
    "MTLLoRA",
    "MiSS",
    "MonteCLoRA",
    "MultitaskPromptTuning",
    "NoReFT",
    "OFT",
    "OSF",
    "PEANuT",
    "PSOFT",
    "PTuning",
    "PVeRA",
    "Poly",
    "PrefixTuning",
    "PromptTuning",
    "QALoRA",
    "RandLoRA",
    "RoAd",
    "Rows",
    "SHiRA",
    "SSF",
    "Selective",
    "Shadow",
    "SmidgenError",
    "Stack",
    "SuperTuning",
    "Targets",
    "TinyLoRA",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeLoRA",
    "VeRA",
    "VisualPromptTuning",
    "WaveFT",
    "Weighted",
    "XLoRA",
    "adapters_of",
    "attach",
    "linear_cross_entropy",
    "load",
    "quantise",
    "recompute",
    "to_lora",
]


def packages_after(statement: str) -> set[str]:
    """The top-level packages, Python's own left out, that a fresh process has imported after `statement`."""
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name for name in run.stdout.split() if name not in sys.stdlib_module_names}


def test_importing_smidgen_imports_no_other_package():
    assert packages_after("import smidgen") <= packages_after("pass") | {"smidgen"}


def test_attaching_waits_for_no_file_format():
    program = "from smidgen import LoRA, attach\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "smidgen.core.attach" in run.stdout.split()
    assert not [name for name in run.stdout.split() if name.startswith("smidgen.formats")]


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"], ["--version"]])
def test_pages_of_help_and_the_version_import_no_torch(arguments: list[str]):
    program = (
        "import sys\nfrom smidgen.cli.main import main\ntry:\n    main()\n"
        "except SystemExit as end:\n    sys.exit('torch' in sys.modules or end.code)"
    )
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert "smidgen" in run.stdout


def test_its_names_import_no_package_but_torch_and_zlib_ng():
    assert packages_after("from smidgen import *") <= packages_after("import torch, zlib_ng.zlib_ng") | {"smidgen"}


def test_the_public_names_are_these_and_no_others():
    assert sorted(smidgen.__all__) == PUBLIC_NAMES


def test_every_method_is_a_public_name():
    ours = [method for method in methods().values() if method.__module__.startswith("smidgen.")]
    assert {method.__name__ for method in ours} <= set(PUBLIC_NAMES)


def test_type_checkers_are_shown_the_same_names_in_the_same_places():
    imports = [
        node for node in ast.walk(ast.parse(Path(smidgen.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    shown = {name.name: node.module for node in imports if node.level for name in node.names}
    assert shown == smidgen._PLACES


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LoRa"):
        smidgen.LoRa  # noqa: B018
