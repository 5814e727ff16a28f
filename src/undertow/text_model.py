"""A network that reads text, with its tokenizer, and how a text becomes its input."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from .classifier import Classifier, find_class
from .display import Part, ShownTable, brief
from .errors import InputError, ModelError, TargetError, printable
from .images import Preprocessing


@dataclass(frozen=True)
class NoPhotographs(Preprocessing):
    """In the place of a preprocessing, where a network reads text."""

    def view(self, image: Any) -> NoReturn:
        """Refuse a photograph.

        Raises:
            ModelError: always.
        """
        raise ModelError(READS_TEXT)


READS_TEXT = (
    "the model reads text, not photographs: give it one by --text or --text-file, or in Python by "
    "ut.explain_text(model, text)"
)


@dataclass(frozen=True)
class Encoded:
    """A text as a network reads it.

    Attributes:
        inputs: the keyword arguments of its call, `(1, T)` each.
        pieces: the text of each token, with the space before it.
        left_out: how many tokens were left out, because it reads no more.
    """

    inputs: dict[str, Any]
    pieces: tuple[str, ...]
    left_out: int = 0


@dataclass(frozen=True, repr=False)
class TextModel(Classifier):
    """A network that classifies a text, or predicts its next token, with its tokenizer: of `ut.load("hf:...")`.

    Args:
        tokenizer: of transformers.
        embeddings: the dotted name of the module that embeds token ids; explanations are at its output.
        limit: how many tokens the network reads at most; None where nothing says so.
        predicts: "class", or "next token", whose classes are the tokens of the vocabulary, scored at each position.
        vocabulary: how many tokens the network embeds; 0 where nothing says so.
        exclusive: the scores are logits of classes of which one alone is right; else each stands for itself.
        decoder_start: of an encoder-decoder (T5, BART), which reads the text in its encoder: the tokens that its
            decoder begins with.

    The others are as of `Classifier`; there is no preprocessing of photographs.
    """

    tokenizer: Any = None
    embeddings: str = ""
    limit: int | None = None
    predicts: str = "class"
    decoder_start: tuple[int, ...] = ()
    vocabulary: int = 0
    exclusive: bool = True

    def _shown(self) -> Iterator[Part]:
        yield f"TextModel {self.reference}: {type(self.module).__name__}, weights {self.weights}"
        what = "classes" if self.predicts == "class" else "tokens"
        facts = [
            ("predicts", self.predicts + " of the decoder" * bool(self.decoder_start)),
            (what, f"{len(self.classes):,}: {brief(self.classes)}"),
            ("tokenizer", type(self.tokenizer).__name__),
            ("reads", f"{self.limit:,} tokens at most" if self.limit else ""),
            ("embeddings", self.embeddings),
            ("weights' SHA-256", self.weights_sha256[:16]),
        ]
        rows = [(name, text) for name, text in facts if text]
        yield ShownTable(("", ""), rows, len(rows))

    def prepare(self, photographs: Any, device: str = "cpu") -> Any:
        """Return a text as the keyword arguments of the module, `(1, T)` each.

        Raises:
            InputError: it is empty, or longer than the network reads; `encode` cuts it.
        """
        encoded = self.encode(photographs, device)
        if encoded.left_out:
            raise InputError(
                f"the text has {encoded.left_out} tokens more than the {self.limit} that {self.reference} reads; "
                "shorten it"
            )
        return encoded.inputs

    @property
    def cuts(self) -> str:
        """What is left out of a text that is too long: "last" tokens, of a language model "first" ones."""
        return "last" if self.predicts == "class" or self.decoder_start else "first"

    def encode(self, text: str, device: str = "cpu", decoder_text: str = "") -> Encoded:
        """Return a text as the network reads it, cut where it is too long: its end, of a language model its beginning.

        Args:
            decoder_text: what an encoder-decoder has written already.

        Raises:
            InputError: it is no text, or has no token; a decoder_text where there is no decoder.
        """
        if decoder_text and not self.decoder_start:
            raise InputError(
                f"{self.reference} has no decoder beside its encoder; leave --decoder-text or decoder_text= out, and "
                "give it one text"
            )
        if not isinstance(text, str):
            raise InputError(f"a text is a str, and this is {type(text).__name__}; pass one, or a list of them")
        if not text.strip():
            raise InputError("the text is empty; give some words")
        encoded = self._encoded(text, self.limit)
        ids = [int(i) for i in encoded["input_ids"][0]]
        if not ids:
            raise InputError(f"the text {printable(text[:40])!r} has no token for {self.reference}")
        if 0 < self.vocabulary <= max(ids):
            raise InputError(
                f"the tokenizer of {self.reference} gives token {max(ids)}, and the network embeds {self.vocabulary}: "
                "it is another network's; load its own, as save_pretrained(FOLDER) of both writes it"
            )
        whole = encoded if self.limit is None or len(ids) < self.limit else self._encoded(text, None)
        left_out = len(whole["input_ids"][0]) - len(ids)
        offsets = encoded.pop("offset_mapping")[0].tolist() if "offset_mapping" in encoded else None
        takes = {"input_ids", "attention_mask"} | set(inspect.signature(self.module.forward).parameters)
        inputs = {name: tensor.to(device) for name, tensor in encoded.items() if name in takes}
        if self.decoder_start:
            written = self._token_ids(decoder_text) if decoder_text else []
            inputs["decoder_input_ids"] = inputs["input_ids"].new_tensor([[*self.decoder_start, *written]])
        return Encoded(inputs, tuple(self._pieces(text, ids, offsets)), left_out)

    def _encoded(self, text: str, limit: int | None) -> dict[str, Any]:
        """Return what the tokenizer makes of a text, cut to a number of tokens, ids first."""
        tokenizer, side = self.tokenizer, self.tokenizer.truncation_side
        how = {"truncation": True, "max_length": limit} if limit else {"truncation": False}
        try:
            tokenizer.truncation_side = "right" if self.cuts == "last" else "left"
            made = tokenizer(
                text, return_tensors="pt", return_offsets_mapping=bool(tokenizer.is_fast), verbose=False, **how
            )
        finally:
            tokenizer.truncation_side = side
        return {"input_ids": made["input_ids"], **made}

    def _pieces(self, text: str, ids: list[int], offsets: list[list[int]] | None) -> Iterator[str]:
        """Yield the text of each token, so that they add up to the text; special tokens in their own spelling."""
        if offsets is None:
            yield from map(self.piece, ids)
            return
        special = set(self.tokenizer.all_special_ids)
        done = next((start for start, end in offsets if end > start), 0)
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            yield self.piece(token_id) if start == end and token_id in special else text[done:end]
            done = max(done, end)

    def piece(self, token_id: int) -> str:
        """Return a token as it is read, with its space: a tokenizer strips the space when it decodes one alone."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        text = str(self.tokenizer.decode([token_id]))
        return f" {text.lstrip()}" if piece.startswith(("Ġ", "▁")) else text

    def name(self, class_id: int) -> str:
        """Return the name of a class, or a token as it is read."""
        return str(self.classes[class_id]) if self.predicts == "class" else self.piece(class_id)

    def candidates(self, word: str) -> list[int]:
        """Return the classes, or the tokens, that a word may mean: of a token, with and without a space before it.

        Raises:
            TargetError: there is no such class, or no single token for the word.
        """
        if self.predicts == "class":
            return [find_class(self, word)]
        if not word:
            raise TargetError(f"an empty word is no token of {self.reference}; name one, or its number")
        if word.strip().lstrip("-").isdecimal():
            return [find_class(self, word.strip())]
        ids = [self._token_ids(form) for form in dict.fromkeys((word, f" {word}"))]
        single = list(dict.fromkeys(i[0] for i in ids if len(i) == 1 and i[0] != self.tokenizer.unk_token_id))
        if not single:
            parts = ", ".join(f"{printable(self.piece(i))!r} ({i})" for i in ids[0])
            raise TargetError(
                f"{printable(word)!r} is no single token of {self.reference}: it is {parts}; name one of them, or its "
                "number"
            )
        return single

    def _token_ids(self, word: str) -> list[int]:
        if self.decoder_start:  # a translator may spell what it writes otherwise than what it reads
            return [int(i) for i in self.tokenizer(text_target=word, add_special_tokens=False)["input_ids"]]
        return [int(i) for i in self.tokenizer.encode(word, add_special_tokens=False)]
