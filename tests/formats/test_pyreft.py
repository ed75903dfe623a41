"""Folders of pyreft 0.1.0 give the outputs that pyreft gave.

others/pyreft.safetensors was written once by that package, on transformers 4.57: a Llama of three blocks, the state
dicts of interventions of rank 2 at its blocks 0 and 2, moved by noise, and the logits of `tokens()`, of which the first
two, or those and the last two, were intervened on.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from smidgen import adapters_of, load
from smidgen.core.errors import FolderError

STORED = load_file(Path(__file__).parent / "others" / "pyreft.safetensors")
TYPES = {"loreft": "Loreft", "noreft": "Noreft", "direft": "Direft"}


def below(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in STORED.items() if key.startswith(f"{name}/")}


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=32,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(below("model"))
    return model


def tokens() -> Tensor:
    return torch.arange(1, 15).view(2, 7)


def written(folder: Path, name: str, positions: str | None, **changes: Any) -> Path:
    """The folder that pyreft saved."""
    folder.mkdir()
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in below(name).items():
        if "/" in key:
            file, tensor = key.split("/")
            states.setdefault(file, {})[tensor] = value
    for file, state in states.items():
        torch.save(state, folder / f"intkey_{file}.bin")
    places = [[layer, "block_output", "pos", 1, 2, *[None] * 9] for _ in range(len(states) // 2) for layer in (0, 2)]
    config = {
        "representations": places,
        "intervention_types": [f"<class 'pyreft.interventions.{TYPES[name[:6]]}Intervention'>"] * len(states),
        "mode": "parallel",
    }
    config |= changes if positions is None else {"positions": positions} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "positions"),
    [("loreft_apart", "f2+l2"), ("loreft_shared", "f2+l2"), ("noreft_one", "f2"), ("direft_one", "f2")],
)
def test_its_folders_give_its_outputs(tmp_path: Path, name: str, positions: str) -> None:
    model = llama()
    with torch.no_grad():
        base = model(tokens()).logits
        adapters = load(model, written(tmp_path / "folder", name, positions), "steer")
        out = model(tokens()).logits
        assert adapters.active == "steer"
        assert [site.path for site in adapters.sites("steer")] == ["model.layers.0", "model.layers.2", "model", ""]
        assert not torch.allclose(out, base, atol=0.1)
        torch.testing.assert_close(out, STORED[f"{name}/logits"], rtol=0, atol=1e-5)
        adapters.save(tmp_path / "ours")
        again = llama()
        load(again, tmp_path / "ours")
        assert torch.equal(again(tokens()).logits, out)


def test_blocks_may_be_named_by_their_path(tmp_path: Path) -> None:
    rows = [[None, f"model.layers[{layer}].output", "pos", 1, 2, *[None] * 9] for layer in (0, 2)]
    folder = written(tmp_path / "folder", "noreft_one", "f2", representations=rows)
    for layer in (0, 2):
        own = folder / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin"
        own.rename(folder / f"intkey_comp_model_layers[{layer}]_output_unit_pos_nunit_1#0.bin")
    model = llama()
    load(model, folder)
    torch.testing.assert_close(model(tokens()).logits, STORED["noreft_one/logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "changes", "message"),
    [
        (None, {}, r'does not say which tokens it acts on.*Add what it was trained with.*"positions": "f1\+l1"'),
        ("f2", {}, 'has 2 interventions at a block, and positions is "f2"'),
        (
            "f1+l1",
            {"intervention_types": ["<class 'pyvene.x.AdditionIntervention'>"] * 4},
            "interventions Addition; read",
        ),
        ("f1+l1", {"intervention_types": []}, "as many intervention_types"),
        (
            "f1+l1",
            {"representations": [[0, "mlp_output", "pos", 1, 2, *[None] * 9]] * 4},
            "intervenes at layer 0, 'mlp_o",
        ),
        ("f1+l1", {"representations": [[9, "block_output", "pos", 1, 2, *[None] * 9]] * 4}, "none of the 3 blocks"),
        (
            "f1+l1",
            {"representations": [[0, "../../x", "pos", 1, 2, *[None] * 9]] * 4},
            "intervenes on '../../x' by 'pos'",
        ),
        ("f1+l1", {"representations": [[0, "block_output", "h", 1, 2, *[None] * 9]] * 4}, "by 'h'; read are positions"),
    ],
)
def test_what_cannot_be_read_is_said_and_the_model_is_left_alone(
    tmp_path: Path, positions: Any, changes: dict[str, Any], message: str
) -> None:
    model = llama()
    with pytest.raises(FolderError, match=message):
        load(model, written(tmp_path / "folder", "loreft_apart", positions, **changes))
    assert adapters_of(model) is None


def test_a_state_dict_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", "noreft_one", "f2")
    file = next(folder.glob("*.bin"))
    torch.save({"weight": torch.zeros(2, 8), "other": torch.zeros(2)}, file)
    with pytest.raises(FolderError, match=r"holds weight, other; read are weight, bias and one projection"):
        load(llama(), folder)
    torch.save({"weight": torch.zeros(2, 9), "bias": torch.zeros(2), "proj_layer.weight": torch.zeros(2, 8)}, file)
    with pytest.raises(FolderError, match=r"every.W is \(2, 9\), the model needs \(2, 8\)"):
        load(llama(), folder)
