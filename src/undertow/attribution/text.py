"""The verb for texts: how each token speaks for a class, or for the next token."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..display import Part, Shown, ShownTable, escaped
from ..errors import InputError, RuleError, UndertowWarning
from ..files import published, readable
from ..frameworks.base import as_numpy, capability, framework_of_model
from ..outputs import head_of
from ..photographs import result_folder, versions
from ..targets import Token
from ..text_model import Encoded, TextModel
from .explain import explain
from .photograph import collected
from .predictions import Prediction, likeliest
from .result import Attribution
from .tokens import Tokens

DEFAULT_RULE = "attnlrp"
TEXT = "text.json"
"""In the folder of a text: all but its maps."""


@dataclass(frozen=True, eq=False, repr=False)
class ExplainedText(Shown):
    """How the tokens of a text speak for classes, or for next tokens.

    On the last line of a notebook's cell it shows the text, shaded.

    Attributes:
        text: as it was given.
        pieces: the text of each token that the network read, with the space before it, T of them.
        predictions: the five likeliest classes or next tokens, most likely first.
        targets: the explained ones as (id, name, score).
        attribution: values `(1, K, T, features)` at the embeddings, for K targets.
        left_out: how many tokens the network did not read, because it reads no more.
        notes: what belongs beside the map.
        seconds: wall time of the explanation.
    """

    text: str
    pieces: tuple[str, ...]
    predictions: list[Prediction]
    targets: list[tuple[int, str, float]]
    attribution: Attribution
    left_out: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def tokens(self, target: int = 0) -> Tokens:
        """Return the text's tokens with their values for the target of a position, `(T,)`, summed over the features."""
        values = as_numpy(self.attribution.values)[0, target].astype(np.float64)
        values = values.reshape(len(self.pieces), -1).sum(-1)
        class_id, name, _ = self.targets[target]
        score = float(as_numpy(self.attribution.scores)[0, target])
        return Tokens(list(self.pieces), values, f"{self.attribution.rule}: {name} ({class_id}), score {score:.4g}")

    def all_tokens(self) -> list[Tokens]:
        """Return `tokens` of each target."""
        return [self.tokens(k) for k in range(len(self.targets))]

    def _shown(self) -> Iterator[Part]:
        yield f"ExplainedText of {len(self.pieces)} tokens: {self.attribution.rule}; predicts {self.predictions[0]}"
        yield from self.notes
        for shaded in self.all_tokens():
            strongest = ", ".join(f"{token!r} {value:+.3g}" for token, value in shaded.strongest())
            yield f"{shaded.title}: {strongest}"
        rows = [(p.name, f"{p.score if p.probability is None else p.probability:.3f}") for p in self.predictions]
        yield ShownTable(("predicted", ""), rows, len(rows))

    def _repr_html_(self) -> str:
        return "".join(filter(None, (shaded._repr_html_() for shaded in self.all_tokens())))


@overload
def explain_text(
    model: Any,
    text: str,
    *,
    tokenizer: Any = None,
    rule: Any = None,
    target: Any = None,
    at: str | None = None,
    decoder_text: str = "",
    **options: Any,
) -> ExplainedText: ...
@overload
def explain_text(
    model: Any,
    text: Sequence[str],
    *,
    tokenizer: Any = None,
    rule: Any = None,
    target: Any = None,
    at: str | None = None,
    decoder_text: str = "",
    **options: Any,
) -> list[ExplainedText]: ...
def explain_text(
    model: Any,
    text: str | Sequence[str],
    *,
    tokenizer: Any = None,
    rule: Any = None,
    target: Any = None,
    at: str | None = None,
    decoder_text: str = "",
    **options: Any,
) -> ExplainedText | list[ExplainedText]:
    """Explain what a network says of a text: its class, or the token that comes next.

    Of an encoder-decoder (T5, BART) it is the token that the decoder writes next, by the tokens that the encoder reads.

    Each text is explained alone, so that no padding is in it. A text longer than the network reads is cut, with a
    warning: at its end for classes, at its beginning for the next token.

    Args:
        model: of `ut.load("hf:...")`; or a network of transformers, with its `tokenizer`.
        text: a text, or a list of them.
        rule: as `explain` takes it; None is "attnlrp".
        target: None (the likeliest), a class id or name, a token id or a single token ("Paris" is taken with or
            without a space before it, whichever is likelier), a list of these, or "top:K".
        at: the layer whose output the map is of, `(1, T, ...)`; None is the embeddings of the tokens.
        decoder_text: what a decoder has written already; "" is its start.
        options: others of `explain`, such as `estimator="input-times"`.

    Returns:
        An `ExplainedText`, or a list of them for a list.

    Raises:
        InputError: an empty text, or an argument that cannot be used; TargetError: no such class or token.
        ModelError: the network reads no text.
        RuleError: the network cannot be walked by the rule.

    Source: AttnLRP, arXiv 2402.05602.

    >>> import transformers, tokenizers, undertow as ut
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"not": 0, "bad": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=3, **sizes))
    >>> explained = explain_text(model, "not bad", tokenizer=tokenizer, target=1)
    >>> explained.tokens().tokens, explained.attribution.values.shape
    (['not', ' bad'], torch.Size([1, 1, 2, 8]))
    """
    ready = _text_model(model, tokenizer)
    if isinstance(text, list | tuple):
        return [_explained(ready, one, decoder_text, rule, target, at, options) for one in text]
    return _explained(ready, text, decoder_text, rule, target, at, options)


def _text_model(model: Any, tokenizer: Any) -> TextModel:
    if isinstance(model, TextModel):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    ready: TextModel = capability(framework_of_model(model), "texts").text_model(model, tokenizer)
    return ready


def _explained(
    model: TextModel, text: Any, decoder_text: str, rule: Any, target: Any, at: str | None, options: dict[str, Any]
) -> ExplainedText:
    encoded = model.encode(text, str(getattr(model.module, "device", "cpu")), decoder_text)
    scores = _scores(model, encoded)
    asked = "top:1" if target is None else target
    if not (isinstance(asked, str) and asked.startswith("top:")):
        asked = [_ids(model, asked, scores)]
    started = time.perf_counter()
    with collected() as remarks:
        attribution = _attribution(model, encoded, rule, asked, at, options)
    seconds = time.perf_counter() - started
    notes = [*_cut(model, encoded), *remarks]
    for note in notes:
        warnings.warn(note, UndertowWarning, stacklevel=3)
    ids = as_numpy(attribution.targets)[0].tolist()
    return ExplainedText(
        text=text,
        pieces=encoded.pieces,
        predictions=[
            replace(p, name=model.name(p.class_id)) for p in likeliest(scores, model.classes, model.exclusive)
        ],
        targets=[(i, model.name(i), float(scores[i])) for i in ids],
        attribution=replace(attribution, names={i: model.name(i) for i in ids}),
        left_out=encoded.left_out,
        notes=notes,
        seconds=round(seconds, 4),
    )


def _scores(model: TextModel, encoded: Encoded) -> npt.NDArray[np.float64]:
    """Return the scores of a text's classes, or of its next token, `(classes,)`."""

    def call(ids: Any) -> Any:
        scores = head_of(model.module(**{**encoded.inputs, "input_ids": ids}), model.output)
        return scores if model.predicts == "class" else scores[:, -1]

    explainer = capability(framework_of_model(model.module), "explain")
    scores: npt.NDArray[np.float64] = explainer.scores(call, encoded.inputs["input_ids"])[0]
    return scores


def _ids(model: TextModel, target: Any, scores: npt.NDArray[np.float64]) -> list[int]:
    """Return the ids that numbers and words mean; of several tokens that a word may be, the likeliest.

    Raises:
        TargetError: no such class or token.
    """
    words = [target] if isinstance(target, str | int) else list(target)
    return list(dict.fromkeys(max(model.candidates(str(word)), key=lambda i: scores[i]) for word in words))


def _attribution(
    model: TextModel, encoded: Encoded, rule: Any, target: Any, at: str | None, options: dict[str, Any]
) -> Attribution:
    layer = at or model.embeddings
    if "grad-cam" in str(options.get("estimator", "")):
        raise InputError("grad-cam lays a map over photographs; of a text take its rule at a layer, --at LAYER or at=")
    try:
        attribution = explain(
            model.module,
            encoded.inputs,
            rule=DEFAULT_RULE if rule is None else rule,
            target=target if model.predicts == "class" else Token(target, -1),
            at=layer,
            output=model.output,
            **options,
        )
    except RuleError as error:
        if rule is None:
            error.add_note("(rule='gradient' with estimator='input-times' needs to see into nothing)")
        raise
    shape = tuple(getattr(attribution.values, "shape", ()))
    if len(shape) < 3 or shape[2] != len(encoded.pieces):
        what = f"gives {shape[:1] + shape[2:]}" if shape else "gives several tensors"
        raise InputError(f"layer {layer!r} {what}, not (1, {len(encoded.pieces)}, ...), a place for each token")
    return attribution


def _cut(model: TextModel, encoded: Encoded) -> Iterator[str]:
    if encoded.left_out:
        whole = len(encoded.pieces) + encoded.left_out
        yield (
            f"the text has {whole} tokens and {model.reference} reads {len(encoded.pieces)}: the {model.cuts} "
            f"{encoded.left_out} were left out"
        )


def write_texts(explained: Sequence[ExplainedText], model: TextModel, folder: Path) -> dict[str, Any]:
    """Write one text as several rules explain it: `tokens.html`, a map for each rule, and `text.json` last.

    Files of the same names are replaced. A folder that has a `text.json` is complete. Returns the latter's content.
    """
    first = explained[0]
    with result_folder(folder, TEXT) as result:
        files = ["tokens.html"]
        with published(folder / files[0]) as aside:
            aside.write_text(_page(first, [t for e in explained for t in e.all_tokens()]), encoding="utf-8")
        for e in explained:
            files.append(e.attribution.save(folder / f"{readable(e.attribution.rule)}.safetensors").name)
        result |= {
            "text": first.text,
            "model": model.reference,
            "weights": model.weights,
            "weights_sha256": model.weights_sha256,
            "predicts": model.predicts,
            "predictions": [prediction.to_dict() for prediction in first.predictions],
            "targets": [{"class": i, "name": name, "score": score} for i, name, score in first.targets],
            "tokens": list(first.pieces),
            "left_out": first.left_out,
            "rules": {
                e.attribution.rule: {
                    **e.attribution.to_dict(),
                    "titles": [t.title for t in e.all_tokens()],
                    "values": [t.values.tolist() for t in e.all_tokens()],
                    "seconds": e.seconds,
                }
                for e in explained
            },
            "notes": list(dict.fromkeys(note for e in explained for note in e.notes)),
            "versions": versions(),
            "files": files,
        }
    return result


def _page(first: ExplainedText, shaded: Sequence[Tokens]) -> str:
    body = "".join(tokens._repr_html_() for tokens in shaded)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escaped(str(first.predictions[0]))}</title>"
        '<body style="background:#fff;color:#000;font:1rem/1.6 sans-serif;max-width:60rem;margin:2rem auto">'
        f"<p>predicts {escaped(', '.join(map(str, first.predictions)))}</p>{body}</body></html>\n"
    )
