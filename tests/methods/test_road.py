"""RoAd against its matrix, written out pair by pair in float64, and against Hugging Face PEFT 0.21.2."""

import math

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.road import RoAd

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own

VARIANTS = {"road_1": 4, "road_2": 8, "road_4": 16}  # angles for 8 outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pair_of_outputs_is_turned_and_scaled(variant: str):
    layer, x, g = nn.Linear(3, 8).double(), torch.randn(2, 3).double(), 4
    adapters = attach(nn.Sequential(layer), RoAd(variant=variant, group_size=g, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.theta)
    nn.init.normal_(part.alpha)
    t, a = part.theta.tolist(), part.alpha.tolist()
    R = torch.zeros(8, 8, dtype=torch.float64)
    for group in range(2):
        for place in range(g // 2):
            one, two = group * g + place, group * g + place + g // 2
            entry = {  # of theta and alpha, for cos of one, sin of one, sin of two, cos of two
                "road_1": [group * g // 2 + place] * 4,
                "road_2": [one, one, two, two],
                "road_4": [
                    *(2 * group * g + place, 2 * group * g + g + place),
                    *(2 * group * g + g + place + g // 2, 2 * group * g + place + g // 2),
                ],
            }[variant]
            R[one, one] = a[entry[0]] * math.cos(t[entry[0]])
            R[one, two] = -a[entry[1]] * math.sin(t[entry[1]])
            R[two, one] = a[entry[2]] * math.sin(t[entry[2]])
            R[two, two] = a[entry[3]] * math.cos(t[entry[3]])
    expected = (x @ layer.weight.T + layer.bias) @ R.T
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_angles_and_scales(variant: str):
    model = nn.Sequential(nn.Linear(3, 8), nn.Conv2d(8, 8, 3))
    adapters = attach(model, RoAd(variant=variant, group_size=2, targets=["0", "1"]))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 2 * VARIANTS[variant]


def test_outputs_that_make_no_groups_are_refused():
    with pytest.raises(ConfigError, match="it is even"):
        RoAd(group_size=3)
    with pytest.raises(TargetError, match="8 outputs do not divide into groups of 64"):
        attach(nn.Sequential(nn.Linear(3, 8)), RoAd(targets=Targets("0")))
    with pytest.raises(TargetError, match="none pairs with another's"):
        attach(nn.Sequential(nn.Conv1d(4, 8, 3, groups=4)), RoAd(group_size=4, targets=Targets("0")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_of_hf_peft_are_read_and_written(variant: str):
    from_peft(llama, peft.RoadConfig(variant=variant, group_size=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    to_peft_and_back(llama, RoAd(variant=variant, group_size=16), says={"variant": variant, "group_size": 16})
