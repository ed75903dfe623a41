"""How long a row may be."""

from dataclasses import replace

import pytest
import torch

from smidgen.core.errors import ModelError
from smidgen.tasks.loading import choose_max_length, load_body, load_tokenizer
from smidgen.tasks.models import locate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([10] * 100, 512, 16),  # never below 16
        ([30] * 95 + [100] * 5, 512, 96),  # the 95th percentile lies in between, rounded up to a multiple of 8
        ([400] * 100, 512, 128),  # what pays on a CPU
        ([400] * 100, 64, 64),  # the model's limit
        ([7], 512, 16),
    ],
)
def test_the_length_cuts_few_texts_within_the_limits(lengths, limit, expected):
    length, why = choose_max_length(lengths, limit, CPU)
    assert length == expected
    assert why


def test_the_reason_says_how_many_texts_are_cut():
    assert "100% of the training texts are longer" in choose_max_length([400] * 10, 512, CPU)[1]


def test_where_every_word_counts_the_longest_row_decides():
    assert choose_max_length([10] * 99 + [90], 512, CPU, whole=True) == (96, "the longest training row has 90")
    length, why = choose_max_length([10] * 99 + [900], 512, CPU, whole=True)
    assert length == 128
    assert "1% of the training texts are longer" in why


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(tiny).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(locate(str(tmp_path)))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_model_of_another_kind_than_the_task_needs_is_refused(tmp_path, quantize):
    from transformers import BertConfig, BertModel

    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(tiny).save_pretrained(tmp_path)
    located = replace(locate(str(tmp_path)), quantize=quantize)
    with pytest.raises(ModelError, match=r"is of type bert, and AutoModelForSeq2SeqLM of transformers has none"):
        load_body(located, kind="AutoModelForSeq2SeqLM")
