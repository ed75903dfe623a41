"""Multitask prompt tuning: the product of each row's task by hand, and Hugging Face PEFT 0.21.2."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from smidgen import attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.composition import Rows
from smidgen.core.errors import AttachError, ConfigError, FolderError
from smidgen.methods.multitask_prompt_tuning import MultitaskPromptTuning

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
N, E, K, R = 4, 32, 3, 2
IDS = torch.tensor([[3, 9, 27], [5, 4, 1]])


def strong(model: nn.Module, **settings: object) -> AdapterSet:
    adapters = attach(model, MultitaskPromptTuning(length=N, tasks=K, rank=R, **settings), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return adapters


def run_second(model: nn.Module) -> Tensor:
    """Logits of ten tokens, of task 1."""
    ids = torch.arange(1, 11)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=torch.tensor([1])).logits[:, -10:]


def t5() -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"d_model": E, "d_ff": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 60}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def test_each_row_has_the_prompt_of_its_task() -> None:
    model = llama().double()
    adapters = strong(model)
    shared = adapters.parts("default")["model.embed_tokens"].shared
    tasks = torch.tensor([2, 0])
    got = model(IDS, task_ids=tasks).logits
    adapters.activate(None)
    for row, task in enumerate(tasks.tolist()):
        P = torch.zeros(N, E, dtype=torch.float64)
        for r in range(R):  # equation 1, for more than one rank
            P += torch.outer(shared.U[task, :, r], shared.V[task, r])
        both = torch.cat((shared.prompt * P, model.get_input_embeddings()(IDS[row])))[None]
        expected = model(inputs_embeds=both).logits[:, N:]
        torch.testing.assert_close(got[row : row + 1], expected, rtol=0, atol=1e-12)


def test_all_tasks_start_from_the_shared_prompt() -> None:
    adapters = attach(llama(), MultitaskPromptTuning(length=N, tasks=K, rank=1, task=1), seed=0)
    shared = adapters.parts("default")["model.embed_tokens"].shared
    assert torch.equal(shared(), shared.prompt)


def test_the_number_of_parameters_is_the_formula() -> None:
    assert sum(p.numel() for p in strong(llama()).parameters()) == N * E + K * R * (N + E)


@pytest.mark.parametrize("make", [llama, t5])
def test_a_call_names_the_tasks_or_the_method_does(make) -> None:
    model = make()
    strong(model)
    decoded = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with pytest.raises(AttachError, match=r"names no task.* 0 to 2"):
        model(IDS, **decoded)
    named = model(IDS, task_ids=torch.tensor([2, 2]), **decoded).logits
    assert not torch.allclose(model(IDS, task_ids=torch.tensor([1, 1]), **decoded).logits, named, atol=1e-4)
    with pytest.raises(AttachError, match="names no task"):
        model(IDS, **decoded)  # what was named for one call is not for the next
    other = make()
    strong(other, task=2)
    torch.testing.assert_close(other(IDS, **decoded).logits, named)
    other.generate(IDS, max_new_tokens=2)


def test_rows_of_a_mixed_batch_keep_their_task() -> None:
    model = llama()
    adapters = strong(model)
    alone = model(IDS, task_ids=torch.tensor([2, 1])).logits
    adapters.activate(Rows(None, "default"))
    mixed = model(IDS, task_ids=torch.tensor([2, 1])).logits
    torch.testing.assert_close(mixed[1], alone[1])


def test_compiled_in_one_graph_equals_eager() -> None:
    model = llama()
    strong(model)
    tasks = torch.tensor([0, 2])
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, task_ids=tasks).logits, model(IDS, task_ids=tasks).logits)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_both_ways_with_hf_peft(make) -> None:
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, num_tasks=K, num_ranks=R)
    from_peft(make, config, run=run_second, change=_strong_theirs)
    says = {"num_tasks": K, "num_ranks": R, "num_transformer_submodules": 1}
    to_peft_and_back(make, MultitaskPromptTuning(length=N, tasks=K, rank=R), run=run_second, says=says)


@torch.no_grad()
def _strong_theirs(model: nn.Module) -> None:
    for parameter in model.prompt_encoder.parameters():
        parameter.normal_()


def test_hf_pefts_prompt_of_the_decoder_is_refused(tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
    peft.get_peft_model(t5(), config).save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match=r"num_transformer_submodules is 2.*Train with 1"):
        load(t5(), tmp_path)


def test_a_task_of_its_own_is_kept_in_our_layout(tmp_path: Path) -> None:
    strong(llama(), task=2).save(tmp_path / "a")
    assert "task" in json.loads((tmp_path / "a" / "smidgen.json").read_text())["not_peft"]
    assert load(llama(), tmp_path / "a").method("default").settings()["task"] == 2


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, match in (({"tasks": 0}, "tasks is 0"), ({"rank": 0}, "rank is 0"), ({"task": 1}, "task is 1")):
        with pytest.raises(ConfigError, match=match):
            MultitaskPromptTuning(**settings)
