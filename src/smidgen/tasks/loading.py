"""Loading what transformers knows: a tokenizer, a body, and how long a text may be for it."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import nn

from ..core.errors import MissingDependency, ModelError, RecipeError, SmidgenError
from ..core.quantise import Quantised, load_quantised, quantise, quantised_of
from ..core.safe import read_json
from .base import Asked
from .models import Located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"  # of transformers, which only those import who load something
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_LONGEST_ON_CPU, _LONGEST = 128, 512


def load_tokenizer(located: Located, revision: str | None = None) -> Tokenizer:
    """The model's own tokenizer, with a padding token.  Raises ModelError."""
    located.refuse_yolo()
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _no_transformers(located) from error
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(located.source, revision=revision or "main")
    except Exception as error:
        raise ModelError(f"the tokenizer of {located.name} cannot be loaded: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ModelError(f"{located.name} has no tokenizer: no tokenizer.json, nor what one could be made of")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders have none; padding is masked anyway
    tokenizer.padding_side = "right"
    return tokenizer


def load_body(
    located: Located,
    dtype: str | None = None,
    revision: str | None = None,
    *,
    kind: str | None = "AutoModel",
    whole: bool = False,
) -> nn.Module:
    """The pre-trained model in fp32 unless told otherwise.

    kind: a class of transformers, "AutoModelForCausalLM"; None for the class that the model was saved as, head
    included.   whole: refuse weights that leave a part of it to chance.   Raises ModelError.
    """
    located.refuse_yolo()
    if dtype not in (None, *_DTYPES):
        raise ModelError(f'"{dtype}" is no dtype for a model; there are: {", ".join(_DTYPES)}')
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise _no_transformers(located) from error
    # what it says about heads that are not loaded is as it should be
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if kind is None:
            config = _config(located, revision)
            kind = (config.architectures or ["AutoModel"])[0]
        if located.quantize is not None:
            streamed = _read_quantised(located, located.quantize, dtype, revision, getattr(transformers, kind))
            if streamed is not None:
                return streamed
        body, loaded = getattr(transformers, kind).from_pretrained(
            located.source,
            dtype=dtype or "float32",
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
        )
    except SmidgenError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            raise _other_kind(located, revision, str(kind)) from error
        raise ModelError(f"{located.name} cannot be loaded: {first_line(error)}") from error
    if whole and loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ModelError(
            f"{located.name} has no weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} of "
            f"{type(body).__name__}: it was saved without the part that this task needs"
        )
    if located.quantize is not None:
        located.notes.append(
            f"{located.name} was loaded in full before it was quantised: its files name tensors otherwise than "
            f"{type(body).__name__} does"
        )
        quantise(body, located.quantize)
    return cast(nn.Module, body)


def _read_quantised(
    located: Located, format: str, dtype: str | None, revision: str | None, kind: Any
) -> nn.Module | None:
    """The model read tensor by tensor, each quantised as it comes, so that it never stands in memory unquantised.

    None where its files name their tensors otherwise than its class does, which only transformers can translate.
    """
    from accelerate import init_empty_weights

    config = _config(located, revision)
    wanted = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype or "float32")
    with init_empty_weights(include_buffers=False):
        build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        body: nn.Module = build(config, dtype=wanted)
    cast(Any, body).tie_weights()
    files = _weight_files(located.source, revision)
    if not files or load_quantised(body, files, format) is None:
        return None
    return body.eval()


def _weight_files(source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a model, in a folder, in the hub's cache or downloaded; empty if it has none."""
    from transformers.utils.hub import cached_file

    def found(name: str) -> Path | None:
        where = cached_file(
            source,
            name,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=False,
        )
        return None if where is None else Path(where)

    index = found("model.safetensors.index.json")
    if index is None:
        whole = found("model.safetensors")
        return [] if whole is None else [whole]
    names = dict.fromkeys(str(name) for name in read_json(index, max_bytes=64 << 20)["weight_map"].values())
    return [file for name in names if (file := found(name)) is not None]


def hold_as_asked(body: nn.Module, located: Located) -> Quantised | None:
    """Quantise what was not read so already, where that was asked for; what is quantised."""
    if located.quantize is None:
        return None
    return quantised_of(body) or quantise(body, located.quantize)


def settle_length(
    said: int | None,
    lengths: Sequence[int],
    model: nn.Module,
    tokenizer: Tokenizer,
    asked: Asked,
    *,
    whole: bool = False,
) -> int:
    """The maximal length of a row in tokens, entered in the plan.

    lengths: of training rows, uncut.   whole: cut none that the limits let through.
    Raises RecipeError where more is asked than the model has positions.
    """
    limit = int(min(positions_of(model), tokenizer.model_max_length)) - asked.reserved
    choice = choose_max_length(lengths, limit, asked.device, whole=whole)
    taken = f" beside a prompt of {asked.reserved}" if asked.reserved else ""
    return length_within(limit, "max_length", said, choice, asked, taken)


def length_within(
    limit: int, name: str, said: int | None, choice: tuple[int, str], asked: Asked, taken: str = ""
) -> int:
    """A length in tokens, as said or as chosen for a reason, entered in the plan.

    Raises RecipeError where more is said than the model has positions.   taken: what some of these are for, in words.
    """
    length = asked.plan.decide(name, said, *choice)
    if length > limit:
        raise RecipeError(f"task.{name} is {length}, and {asked.model.name} has {limit} positions{taken}")
    return length


def positions_of(model: nn.Module) -> int:
    """How many positions a body of transformers has; a million where it does not say."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def choose_max_length(
    lengths: Sequence[int], model_limit: int, device: torch.device, *, whole: bool = False
) -> tuple[int, str]:
    """A length that cuts few texts and wastes little time: the 95th percentile of the training texts, or the longest
    of them (`whole`), within limits.

    lengths: of the training texts in tokens, uncut.   model_limit: positions the model has.
    """
    at_most = min(model_limit, _LONGEST_ON_CPU if device.type == "cpu" else _LONGEST)
    wanted = max(lengths) if whole or len(lengths) == 1 else int(statistics.quantiles(lengths, n=20)[-1])
    wanted = max(16, math.ceil(wanted / 8) * 8)
    if whole and wanted <= at_most:
        return wanted, f"the longest training row has {max(lengths)}"
    if wanted <= at_most:
        return wanted, f"19 of 20 training texts are no longer (the longest: {max(lengths)})"
    cut = sum(n > at_most for n in lengths) / len(lengths)
    limit = "the model's limit" if at_most == model_limit else f"the most that pays on a {device.type.upper()}"
    return at_most, f"{limit}; {cut:.0%} of the training texts are longer and are cut"


def pooling_for(config: Any) -> Literal["mean", "last"]:
    """How to pool the hidden states of a transformers body: by the mean, or by the last token where it looks backwards.

    Raises ModelError for encoder-decoders, which have no single sequence of hidden states.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder-decoder, with two sequences of hidden states; this task takes an "
            "encoder (BERT, DeBERTa ...) or a decoder (Llama, GPT-2 ...)"
        )
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    backwards = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    return "last" if backwards else "mean"


def first_line(error: Exception) -> str:
    """What a library's error says, in one line with its type."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _config(located: Located, revision: str | None) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(located.source, revision=revision or "main")


def _other_kind(located: Located, revision: str | None, kind: str) -> ModelError:
    """For a model of which transformers has no class of this kind, such as a BERT where a seq2seq model is needed."""
    found = _config(located, revision).model_type
    return ModelError(
        f"{located.name} is of type {found}, and {kind} of transformers has none of that type: this task "
        "needs another kind of model, or this model another --task"
    )


def _no_transformers(located: Located) -> MissingDependency:
    return MissingDependency(f'transformers is needed for {located.name}: pip install "smidgen[text]"')
