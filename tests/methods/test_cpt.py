"""CPT: where its tokens may be, its loss by a loop, and Hugging Face PEFT 0.21.2."""

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smidgen import attach
from smidgen.adapters import AdapterSet
from smidgen.core.errors import ConfigError
from smidgen.methods.cpt import CPT

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama, llama_classifier

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
CONTEXT = (5, 11, 3, 42, 8, 7, 21, 2)
TYPES = (1, 2, 3, 4, 5, 6, 7, 8)  # two examples
IDS = torch.tensor([[3, 9, 27, 4], [5, 4, 1, 8]])
LABELS = torch.tensor([[-100, 9, 27, 4], [-100, -100, 1, 8]])
E = 32


def attached(model: nn.Module, **settings: Any) -> tuple[AdapterSet, Any]:
    adapters = attach(model, CPT(token_ids=CONTEXT, token_types=TYPES, **settings))
    return adapters, adapters.parts("default")[adapters.sites("default")[0].name].shared


def test_it_starts_as_the_examples_themselves() -> None:
    model: Any = llama().double()
    expected = model(torch.cat((torch.tensor(CONTEXT).expand(2, -1), IDS), dim=1)).logits[:, len(CONTEXT) :]
    attached(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-12)


def test_tokens_move_no_farther_than_they_may_and_labels_do_not() -> None:
    model: Any = llama()
    adapters, shared = attached(model, epsilon=0.4, format_epsilon=0.2)
    with torch.no_grad():
        shared.prompt.add_(1.0)
        shared.prompt[0] = shared.start[0] + 1e-4
    moved = (shared() - shared.start).norm(dim=1) / (E / 2048) ** 0.5
    expected = torch.tensor([1e-4 * E**0.5 / (E / 2048) ** 0.5, 0.4, 0.2, 0, 0.2, 0.4, 0.2, 0])
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    assert sum(p.numel() for p in adapters.parameters()) == 6 * E
    before = shared()
    shared.after = adapters.method("default").after_step
    with torch.no_grad():
        shared.after(adapters.parts("default"), 1, 2)
    torch.testing.assert_close(shared.prompt, before[shared.rows])
    shared().square().sum().backward()
    torch.testing.assert_close(shared.prompt.grad, 2 * before[shared.rows])


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_loss_is_over_the_examples_too_and_decays(decay: float) -> None:
    model: Any = llama().double()
    adapters, _ = attached(model, decay=decay)
    types = torch.tensor([[1, 4, 4, 4], [2, 3, 4, 8]])
    out = model(IDS, labels=LABELS, input_type_mask=types)
    as_tuple = model(IDS, labels=LABELS, input_type_mask=types, return_dict=False)
    adapters.activate(None)
    ids = torch.cat((torch.tensor(CONTEXT).expand(2, -1), IDS), dim=1)
    logits = model(ids).logits
    torch.testing.assert_close(out.logits, logits[:, len(CONTEXT) :])
    # row 0 has labels of three examples, row 1 of four: weight decay ** (how many come after)
    examples = [[(3, 2), (7, 1), (9, 0), (10, 0), (11, 0)], [(3, 3), (7, 2), (10, 1), (11, 0)]]
    losses = [
        decay**after * F.cross_entropy(logits[row, place - 1], ids[row, place])
        for row, found in enumerate(examples)
        for place, after in found
    ]
    torch.testing.assert_close(out.loss, sum(losses) / len(losses))
    torch.testing.assert_close(as_tuple[0], out.loss)
    assert types[0, 1] == 4  # what was given stays as it was


@pytest.mark.parametrize("weighted", [{}, {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}])
def test_loss_and_logits_are_hugging_face_pefts(weighted: dict[str, Any]) -> None:
    names = {"cpt_token_ids": list(CONTEXT), "cpt_tokens_type_mask": list(TYPES), "cpt_mask": [1] * 8}
    theirs = peft.get_peft_model(llama(), peft.CPTConfig(task_type="CAUSAL_LM", **names, **weighted)).eval()
    model: Any = llama()
    attached(model, decay=weighted.get("opt_loss_decay_factor", 1.0))
    ours, other = model(IDS, labels=LABELS), theirs(IDS, labels=LABELS)
    torch.testing.assert_close(ours.loss, other.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logits, other.logits[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_both_ways_with_hf_peft(make: Any) -> None:
    names = {"cpt_token_ids": list(CONTEXT), "cpt_tokens_type_mask": list(TYPES), "cpt_mask": [1] * 8}
    far = {"opt_projection_epsilon": 30.0, "opt_projection_format_epsilon": 2.0}
    loss = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
    from_peft(make, peft.CPTConfig(task_type="CAUSAL_LM", **names, **far, **loss), change=_moved)
    method = CPT(token_ids=CONTEXT, token_types=TYPES, epsilon=30.0, format_epsilon=2.0, decay=0.5)
    to_peft_and_back(make, method, says=names | far | loss)


@torch.no_grad()
def _moved(theirs: Any) -> None:
    theirs.prompt_encoder["default"].delta_embedding.weight.normal_()


def test_compiled_in_one_graph_with_its_loss_equals_eager() -> None:
    model: Any = llama()
    attached(model, decay=0.5)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, labels=LABELS).loss, model(IDS, labels=LABELS).loss)


def test_what_cannot_be_is_refused() -> None:
    for settings, match in (
        ({"token_ids": (1, 2), "token_types": (1,)}, "token_types are 1, token_ids 2"),
        ({"epsilon": 0.0}, "epsilon is 0"),
        ({"decay": 2.0}, "decay is 2"),
    ):
        with pytest.raises(ConfigError, match=match):
            CPT(**settings)
    with pytest.raises(ConfigError, match="there are none"):
        attach(llama(), CPT())
    with pytest.raises(ConfigError, match="are labels, which do not move"):
        attach(llama(), CPT(token_ids=(1,), token_types=(4,)))
    with pytest.raises(ConfigError, match="for causal language models; this is LlamaForSeq"):
        attach(llama_classifier(), CPT(token_ids=CONTEXT))
    with pytest.raises(ConfigError, match=r"\[100\] are no tokens of a vocabulary of 100"):
        attach(llama(), CPT(token_ids=(100,)))
