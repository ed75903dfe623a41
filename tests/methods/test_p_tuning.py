"""P-tuning: its networks by torch's own layers in float64, and Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.errors import ConfigError
from smidgen.methods.p_tuning import PTuning

from ..formats.both_ways import from_peft, run_text, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
N, E, H = 5, 32, 6


def attached(**settings: object) -> AdapterSet:
    return attach(llama().double(), PTuning(length=N, width=H, **settings), seed=0)


def prompt_of(adapters: AdapterSet) -> nn.Module:
    return adapters.parts("default")["model.embed_tokens"].shared


def test_the_mlp_is_the_papers() -> None:
    shared = prompt_of(attached(encoder="mlp"))
    network = nn.Sequential(nn.Linear(E, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, E)).double()
    with torch.no_grad():
        for layer, W, b in zip(network[::2], shared.weights, shared.biases, strict=True):
            layer.weight.copy_(W)
            layer.bias.copy_(b)
    torch.testing.assert_close(shared(), network(shared.inputs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_is_torchs(layers: int) -> None:
    shared = prompt_of(attached(encoder="lstm", layers=layers))
    lstm = nn.LSTM(E, H, layers, bidirectional=True).double()
    with torch.no_grad():
        for number, layer in enumerate(shared.recurrent):
            for way, end in enumerate(("", "_reverse")):
                getattr(lstm, f"weight_ih_l{number}{end}").copy_(layer.from_input[way])
                getattr(lstm, f"weight_hh_l{number}{end}").copy_(layer.from_hidden[way])
                getattr(lstm, f"bias_ih_l{number}{end}").copy_(layer.bias[way])
                getattr(lstm, f"bias_hh_l{number}{end}").zero_()
    hidden, _ = lstm(shared.inputs)
    first, last = (hidden @ shared.weights[0].T + shared.biases[0]).relu(), shared.weights[1]
    torch.testing.assert_close(shared(), first @ last.T + shared.biases[1], rtol=0, atol=1e-14)


def test_what_acts_is_what_the_network_computes_in_front_of_the_tokens() -> None:
    adapters = attached(encoder="mlp")
    P, model, ids = prompt_of(adapters)(), adapters.model, torch.tensor([[3, 9, 27]])
    got = model(ids).logits
    adapters.activate(None)
    both = torch.cat((P[None], model.get_input_embeddings()(ids)), dim=1)
    torch.testing.assert_close(got, model(inputs_embeds=both).logits[:, N:], rtol=0, atol=1e-12)


def test_the_number_of_parameters_is_the_formula() -> None:
    def count(**settings: object) -> int:
        return sum(p.numel() for p in attached(**settings).parameters())

    assert count(encoder="mlp") == N * E + H * (E + H + E) + 2 * H + E
    L = 2
    lstm = sum(2 * 4 * H * (inputs + H + 1) for inputs in (E, 2 * H))
    assert count(encoder="lstm", layers=L) == N * E + lstm + 2 * H * (2 * H + 1) + E * (2 * H + 1)
    assert count(encoder=None) == N * E


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_hidden_size": 16},
        {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ],
)
def test_a_folder_of_hf_peft_is_a_plain_prompt(settings: dict[str, object]) -> None:
    adapters = from_peft(llama, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, **settings))
    assert adapters.method("default").settings()["encoder"] is None


@pytest.mark.parametrize("encoder", ["mlp", "lstm", None])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_what_the_network_computes(make, encoder) -> None:
    to_peft_and_back(make, PTuning(length=N, encoder=encoder, width=H), says={"num_virtual_tokens": N})


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_we_read_our_own_folder_with_its_network(encoder, tmp_path) -> None:
    model = llama()
    adapters = attach(model, PTuning(length=N, encoder=encoder), seed=0)
    adapters.save(tmp_path / "a")
    again = load(llama(), tmp_path / "a")
    assert again.method("default").settings() == adapters.method("default").settings()
    for ours, theirs in zip(adapters.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(run_text(model), run_text(again.model))


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, match in (
        ({"length": 0}, "length is 0"),
        ({"encoder": "gru"}, 'encoder is "gru"'),
        ({"width": 0}, "width is 0"),
        ({"layers": 0}, "layers is 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            PTuning(**settings)
