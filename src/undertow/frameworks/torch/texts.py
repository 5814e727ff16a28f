"""Networks of transformers that read text: where they embed tokens, how many they read, what they predict."""

import importlib
import sys
from typing import Any

from torch import nn

from ...errors import InputError, ModelError
from ...text_model import NoPhotographs, TextModel
from .weights import weights_sha256

ONE_LABEL = "single_label_classification"
_UNLIMITED = 10**9  # a tokenizer's own limit where it has none is larger


def text_model(module: Any, tokenizer: Any, reference: str = "", weights: str = "given with the network") -> TextModel:
    """Complete a network of transformers and its tokenizer.

    Args:
        module: one with a head of classes for a text (...ForSequenceClassification), or of the next token
            (...ForCausalLM, ...LMHeadModel; of an encoder-decoder ...ForConditionalGeneration).
        reference: its name for people; empty: its class.

    Raises:
        ModelError: it is another one.
        InputError: the tokenizer is none.
    """
    predicts = predicted_by(module)
    if not predicts:
        raise ModelError(
            f"a {type(module).__name__} gives neither classes of a text nor its next token; pass a network of "
            "transformers ending in ForSequenceClassification, ForCausalLM or ForConditionalGeneration"
        )
    if predicts == "class" and _has_decoder(module):
        raise ModelError(
            f"a {type(module).__name__} reads its text in its encoder and in its decoder, and words cannot have both "
            "shares here; explain each by ut.explain(model, inputs, at=...), the embeddings of one"
        )
    if not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens")):
        raise InputError(f"a {type(tokenizer).__name__} is no tokenizer; pass tokenizer=, as of AutoTokenizer")
    reference = reference or type(module).__name__
    if predicts == "class":
        labels = module.config.id2label
        classes = tuple(str(labels.get(i, f"class {i}")) for i in range(module.config.num_labels))
    else:
        count = module.get_output_embeddings().weight.shape[0]
        known = tokenizer.convert_ids_to_tokens(list(range(min(count, len(tokenizer)))))
        classes = tuple(str(piece) for piece in known) + tuple(f"token {i}" for i in range(len(known), count))
    return TextModel(
        reference,
        module.eval(),
        NoPhotographs(),
        classes,
        weights,
        weights_sha256(module),
        preprocessing_from="none: it reads text",
        tokenizer=tokenizer,
        embeddings=_embeddings(module),
        limit=_limit(module, tokenizer),
        predicts=predicts,
        decoder_start=_decoder_start(module) if _has_decoder(module) else (),
        vocabulary=int(getattr(module.get_input_embeddings(), "num_embeddings", 0)),
        exclusive=predicts != "class" or getattr(module.config, "problem_type", None) in (None, ONE_LABEL),
    )


def predicted_by(module: Any) -> str:
    """Return what a network of transformers predicts of a text, "class" or "next token"; else ""."""
    if not isinstance(module, nn.Module) or "transformers" not in sys.modules:
        return ""
    return next((what for cls in type(module).__mro__ if (what := predicted_by_class(cls.__name__))), "")


def predicted_by_class(name: str) -> str:
    """Return what the networks of a class of transformers predict of a text, by its name.

    >>> predicted_by_class("BertForSequenceClassification"), predicted_by_class("BertForMaskedLM")
    ('class', '')
    """
    if name.endswith("ForSequenceClassification"):
        return "class"
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return "next token" if any(name in mapping.values() for mapping in names) else ""


def _has_decoder(module: Any) -> bool:
    return bool(getattr(module.config, "is_encoder_decoder", False))


def _decoder_start(module: Any) -> tuple[int, ...]:
    """Return the tokens with which a decoder begins: the start, and one that it is made to write first.

    Raises:
        ModelError: nothing says with which.
    """
    places = getattr(module, "generation_config", None), module.config

    def told(name: str) -> Any:
        return next((value for place in places if (value := getattr(place, name, None)) is not None), None)

    start, first = told("decoder_start_token_id"), told("forced_bos_token_id")
    start = told("bos_token_id") if start is None else start
    if start is None:
        raise ModelError(
            f"nothing says with which token the decoder of a {type(module).__name__} starts; set "
            "decoder_start_token_id in its configuration"
        )
    return (int(start),) if first is None else (int(start), int(first))


def _embeddings(module: Any) -> str:
    """Return the dotted name of what embeds token ids; of an encoder-decoder its encoder's, the first that runs."""
    embeds = (module.get_encoder() if _has_decoder(module) else module).get_input_embeddings()
    name = str(next(name for name, part in module.named_modules() if part is embeds))
    shared = _has_decoder(module) and embeds is module.get_decoder().get_input_embeddings()
    return f"{name}@0" if shared else name


def _limit(module: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a network reads: the fewest that its tokenizer and its positions allow."""
    positions = getattr(module.config, "max_position_embeddings", None)
    limits = [int(n) for n in (getattr(tokenizer, "model_max_length", None), positions) if n and n < _UNLIMITED]
    for part in module.modules():  # RoBERTa counts positions from behind the padding's
        if isinstance(part, nn.Embedding) and part.num_embeddings == positions and part.padding_idx is not None:
            limits.append(part.num_embeddings - part.padding_idx - 1)
    return min(limits, default=None)
