"""Tiny real models with their tokenizers, and a small sentiment-like data set whose words tell the label.

Two layers of 32: a run takes a second.  Everything follows from seeds, so that two processes make the same files.
"""

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

GOOD = ["good", "great", "lovely", "fine", "brilliant", "warm", "funny", "clever", "moving", "superb"]
BAD = ["bad", "awful", "dull", "poor", "tedious", "cold", "clumsy", "stupid", "boring", "weak"]
OTHER = [
    *("the", "a", "film", "plot", "actor", "scene", "story", "it", "was", "is"),
    *("and", "with", "of", "music", "end", "start", "very", "quite", "some", "this"),
]
WORDS = [*GOOD, *BAD, *OTHER]


def tiny_bert(folder: Path, positions: int = 64) -> Path:
    """A BertModel of two layers, with a WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: i for i, word in enumerate([*special, *letters, *(w for w in WORDS if w not in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    _save_tokenizer(tokenizer, folder, positions, ["input_ids", "token_type_ids", "attention_mask"], **names)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
        initializer_range=0.1,  # wider than usual, so that there is something to tune
    )
    return _save_model(lambda: BertModel(config), folder)


def tiny_llama(folder: Path, positions: int = 64) -> Path:
    """A LlamaModel of two layers, with a byte-pair tokenizer that has no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaModel

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS], trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _save_tokenizer(tokenizer, folder, positions, ["input_ids", "attention_mask"], **names)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=positions,
        initializer_range=0.1,  # wider than usual, so that there is something to tune
    )
    return _save_model(lambda: LlamaModel(config), folder)


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different texts with their labels, half of each: two words of one side, and often one of the other."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label = ("negative", "positive")[len(found) % 2]
        own, other = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
        words = generator.choices(OTHER, k=generator.randint(3, 9)) + generator.choices(own, k=2)
        if generator.random() < 0.5:
            words.append(generator.choice(other))
        generator.shuffle(words)
        found.setdefault(" ".join(words), label)
    return list(found.items())


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    """A CSV file with a header; returns its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def _save_tokenizer(tokenizer: Any, folder: Path, positions: int, inputs: list[str], **names: str) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=positions, model_input_names=inputs, **names
    ).save_pretrained(folder)


def _save_model(make: Callable[[], Any], folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(folder)
    return folder
