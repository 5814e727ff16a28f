"""The result of an explanation: plain data that can be looked at, saved and loaded."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..display import Part, Shown, png
from ..errors import InputError, printable
from ..files import published
from ..frameworks.base import AS_IS, as_numpy
from ..layouts import Layout, filled, find_layout, gridded
from ..show import draw, heatmap
from ..similarity import correlation, spearman
from ..structures import map_tensors, tensors_with_paths
from . import parts
from .tokens import Tokens, tokens_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..images import Photograph


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Shown):
    """How each element of an input speaks for a score, and what the rule did to say so.

    On the last line of a notebook's cell it shows its first maps and scores.

    Attributes:
        values: shape and dtype of the input, `(B, ...)`; with K targets a sample, `(B, K, ...)`; in the structure of
            the input, None where there is no map. Unit: score per unit of input; score for "integrated" and
            "input-times". Grad-CAM has one channel, `(B, 1, H, W)`.
        targets: class ids, int64, `(B,)` or `(B, K)`; None where the target was a function.
        scores: the explained outputs, shape of `targets`.
        rule, estimator, through, activations: what was asked for.
        rewired: how many activation calls the rule acted on; 0 for "gradient", which changes none.
        switches: how many max-poolings lie on the way (not counted for "gradient"). Without any, a deconvnet map
            hardly depends on the input.
        skipped: activations seen on the way and left alone, by the name of their graph node.
        opaque: autograd functions of the user's own on the way, by name: a rule cannot reach into them.
        channels_last: images are `(B, H, W, C)`, as in Keras, and so are their values.
        acting: dropouts and batch norms in training, with `training=True`, and other random operations that acted in
            the forward pass, by name: with any, the map depends on chance or on the rest of the batch.
        head: "before softmax" or the like where the score before the last operation was explained, else "as is".
        completeness: of integrated gradients and "deeplift", in the shape of `scores`: the part of the score's
            difference to the baseline that the map does not account for, (difference - sum of the map) / difference;
            else None.
        at: the layers whose outputs the values are of; none: the input.
        plane: height and width of the images, where the values are of a layer's output; else nothing.
        layout: how that output lies over the images; None where that cannot be told.
        names: of the explained classes, by id, where the model has them.
        token_ids: where the values are of token ids' embeddings, the ids, int64, `(B, T)`; else None.
        is_relevance: the map shares out the score itself, as of "attnlrp"; its unit is the score's.
    """

    values: Any
    targets: Any
    scores: Any
    rule: str
    through: str = "graph"
    activations: str = "relu-like"
    estimator: str = "gradient"
    rewired: int = 0
    switches: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    opaque: dict[str, int] = field(default_factory=dict)
    channels_last: bool = False
    acting: dict[str, int] = field(default_factory=dict)
    head: str = AS_IS
    at: tuple[str, ...] = ()
    completeness: Any = None
    names: dict[int, str] = field(default_factory=dict)
    is_relevance: bool = False
    token_ids: Any = None
    plane: tuple[int, ...] = ()
    layout: Layout | None = None

    def tokens(self, tokenizer: Any, sample: int = 0, target: int = 0, ids: Any = None) -> Tokens:
        """Return the tokens of one text, shaded by their attribution in a notebook and by `.terminal()`.

        Of a language model whose embeddings were explained, as by `at="model.embed_tokens"`; the values of several
        inputs or layers are taken where they lie over the tokens.

        Args:
            tokenizer: one of transformers, or anything with `decode`, from a list of ids to text.
            sample: position in the batch.
            target: position among a sample's targets, where there are several.
            ids: `(B, T)` token ids, where the model was given embeddings in their place.

        Raises:
            InputError: no values lie over token ids, or there is no such sample or target.
        """
        given = self.token_ids if ids is None else ids
        if given is None:
            raise InputError("no token ids were explained; pass ids=, or explain ids with at= their embeddings")
        rows, several = as_numpy(given), self.scores.ndim == 2
        self._refuse_missing(sample, target, len(rows))
        for _, tensor in tensors_with_paths(self.values):
            values = as_numpy(tensor)[sample][target] if several else as_numpy(tensor)[sample]
            if values.ndim in (1, 2) and len(values) == rows.shape[1]:
                return tokens_of(values, rows[sample], tokenizer, self._title(sample, target))
        raise InputError(f"no values lie over the token ids {rows.shape}; explain with at= their embeddings")

    def _title(self, sample: int, target: int) -> str:
        """Return what was explained of a sample, and its score."""
        of = as_numpy(self.scores).reshape(len(self.scores), -1)[sample, target]
        return f"{parts.label(self, (sample, target))}, score {of:.4g}"

    @property
    def conservation(self) -> Any:
        """The part of the score that the map adds up to, in the shape of `scores`: 1 where relevance is conserved.

        Biases take some, and so does what a rule holds constant. Of `at=` several layers, a dict with each layer's:
        what arrives there. None for a rule whose map does not share out the score, such as "guided".

        Raises:
            InputError: the values are no batches.

        >>> values, scores = np.array([[2.0, 1.0]]), np.array([4.0])
        >>> Attribution(values, np.array([0]), scores, "attnlrp", is_relevance=True).conservation
        array([0.75])
        """
        if not self.is_relevance:
            return None
        if self.at and isinstance(self.values, dict):
            return {layer: self._conserved(values) for layer, values in self.values.items()}
        return self._conserved(self.values)

    def _conserved(self, values: Any) -> npt.NDArray[np.float64]:
        scores = as_numpy(self.scores).astype(np.float64)
        total = np.zeros_like(scores)
        for _, tensor in tensors_with_paths(values):
            array = as_numpy(tensor).astype(np.float64)
            if array.shape[: scores.ndim] != scores.shape:
                raise InputError(
                    f"values of shape {array.shape} are no batch of {scores.shape[0]}; add them up yourself"
                )
            total += array.reshape(*scores.shape, -1).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(total / scores)

    def _shown(self) -> Iterator[Part]:
        yield from parts.parts(self)

    def _repr_png_(self) -> bytes | None:
        """Return the first maps side by side, as PNG; None of maps that are no images."""
        try:
            image = parts.strip_of(self)
        except Exception:  # the last line of a cell must not fail; the text says what is wrong
            return None
        return None if image is None else png(image)

    def numpy(self, channels_last: bool = False) -> Any:
        """Return `values` as NumPy, `(B, C, H, W)` or as the model has its images; `channels_last` puts C last.

        In the structure of the input.

        Raises:
            InputError: `channels_last` for values that have no channels, such as `(B, features)`.
        """
        return map_tensors(self.values, lambda value: self._array(value, channels_last))

    def _array(self, value: Any, channels_last: bool) -> npt.NDArray[Any]:
        array = as_numpy(value)
        if not channels_last or self.channels_last:
            return array
        axis = 1 if self.scores.ndim == 1 else 2
        if array.ndim < axis + 2:
            raise InputError(f"values of shape {array.shape} have no channels to put last")
        return np.ascontiguousarray(np.moveaxis(array, axis, -1))

    def image(
        self, sample: int = 0, target: int = 0, style: str = "magnitude", grid: tuple[int, int] | None = None
    ) -> "Image":
        """Draw the map of one sample, and of one of its K targets, as a picture of the input's height and width.

        Args:
            sample: position in the batch.
            target: position among a sample's targets, where there are several.
            style: "magnitude" (largest |value| over the channels, clipped at its 99th percentile), "signed" (their sum,
                from blue through white at zero to red, clipped likewise) or "colour" (a tenth of a standard deviation
                about mid-grey, clipped; 1 or 3 channels).
            grid: as `map` has it.

        Raises:
            InputError: the values are not those of images `(B, C, H, W)`, or there is no such sample, target or style.
        """
        return heatmap.draw(self.map(sample, target, grid), style)

    def overlay(
        self,
        photograph: "Photograph | npt.NDArray[np.uint8]",
        sample: int = 0,
        target: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> "Image":
        """Draw the magnitude of one map over its photograph, greyed.

        Args:
            photograph: a path, a Pillow image or uint8 `(H, W, 3)`, of the map's height and width: the part that the
                network saw, as `classifier.preprocessing.view(image)` gives it.
            sample, target, grid: as `image` has them.

        Raises:
            InputError: as `image`, or a photograph of another size.
            PhotographError: the photograph cannot be read.
        """
        return draw(self.map(sample, target, grid), photograph=photograph)

    def map(self, sample: int = 0, target: int = 0, grid: tuple[int, int] | None = None) -> npt.NDArray[Any]:
        """Return the map of one sample, and of one of its K targets, as `(C, H, W)`, wherever the model has C.

        Of a layer's output, such as a vision transformer's patches, `(1, H, W)` over the image: each position fills its
        rectangle with the sum over its features, where the map is in units of the score (as of "attnlrp" or
        "input-times"), else with their ℓ2 norm. Tokens without a place, such as a class token, are left out.

        Args:
            grid: rows and columns of a layer's patches, which come behind all other tokens, where it cannot be told.

        Raises:
            InputError: the values are not those of images, or there is no such sample or target; how a layer's tokens
                lie over the image cannot be told.
        """
        if self.plane:
            return self._over_image(sample, target, grid)
        if grid is not None:
            raise InputError("grid= is of the patches of a layer, as explained with at=; leave it out")
        array = self.numpy()
        several = self.scores.ndim == 2
        if not isinstance(array, np.ndarray) or array.ndim != (5 if several else 4):
            raise InputError("only maps of one batch of images (B, C, H, W) can be drawn; take .numpy() for the rest")
        self._refuse_missing(sample, target, len(array))
        values = array[sample, target] if several else array[sample]
        return np.moveaxis(values, -1, 0) if self.channels_last else values

    def _over_image(self, sample: int, target: int, grid: tuple[int, int] | None) -> npt.NDArray[Any]:
        """Return a layer's values of one sample laid over its image, `(1, H, W)`."""
        array, several = self.numpy(), self.scores.ndim == 2
        if not isinstance(array, np.ndarray):
            raise InputError(f"values are of several layers or calls ({', '.join(self.at)}); explain one to draw it")
        self._refuse_missing(sample, target, len(array))
        values = array[sample, target] if several else array[sample]
        shape, layout = (1, *values.shape), self.layout
        if layout is None and grid is None:
            find_layout(self.at[0], shape, (1, 1, *self.plane))  # says why
            raise InputError(f"layer {self.at[0]!r} gives {shape}: how that lies over the image cannot be told")
        if grid is not None:
            layout = gridded(layout or Layout(-1, ()), shape, grid)
        assert layout is not None
        planes = layout.channels_first(values.astype(np.float64)[None])[0]
        is_share = self.is_relevance or self.completeness is not None or self.estimator == "input-times"
        plane = planes.sum(0) if is_share else np.sqrt(np.square(planes).sum(0))
        return filled(plane[None], self.plane).astype(np.float32)

    def _refuse_missing(self, sample: int, target: int, batch: int) -> None:
        count = self.scores.shape[1] if self.scores.ndim == 2 else 1
        if not 0 <= sample < batch:
            raise InputError(f"there is no sample {sample} in a batch of {batch}")
        if not 0 <= target < count:
            raise InputError(f"there is no target {target} among {count}")

    def likeness(self, of: str = "values") -> npt.NDArray[np.float64]:
        """Return how alike the maps of a sample's K targets are, `(B, K, K)`: does the map change with the class?

        Args:
            of: "values" gives Pearson's correlation of the signed values: 1 for the same map, 0 for unrelated ones, -1
                for opposite ones. "magnitude" gives Spearman's rank correlation of |values|: do the same stand out?

        Raises:
            InputError: there is one target a sample, or `of` is another word.

        >>> maps = np.array([[[1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [-1.0, -2.0, -4.0]]])
        >>> a = Attribution(maps, np.array([[7, 8, 9]]), np.zeros((1, 3)), "gradient")
        >>> a.likeness()[0, 0].tolist(), a.likeness("magnitude")[0, 0].tolist()
        ([1.0, 1.0, -1.0], [1.0, 1.0, 1.0])
        """
        if self.scores.ndim != 2:
            raise InputError("there is one target a sample; explain several, as in target='top:3'")
        if of not in ("values", "magnitude"):
            raise InputError(f"unknown of={of!r}; it is 'values' or 'magnitude'")
        batch, count = self.scores.shape
        parts = [as_numpy(value) for _, value in tensors_with_paths(self.values)]
        flat = np.concatenate([part.reshape(batch, count, -1) for part in parts], -1).astype(np.float64)
        compare = correlation if of == "values" else lambda a, b: spearman(np.abs(a), np.abs(b))
        table = [[[compare(a, b) for b in maps] for a in maps] for maps in flat]
        return np.array(table).reshape(batch, count, count)

    def save(self, path: str | Path) -> Path:
        """Write values, targets and scores as safetensors, and the rest as its metadata; whole or not at all.

        bfloat16 is widened to float32. An existing file of that name is replaced.

        Raises:
            InputError: the name does not end in `.safetensors`.
        """
        from safetensors.numpy import save

        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"{path.name!r} must end in .safetensors; for a picture use .image(0).save(...)")
        tensors = {f"values.{path}" if path else "values": t for path, t in tensors_with_paths(self.values)}
        tensors |= {name: getattr(self, name) for name in ("targets", "scores", "completeness", "token_ids")}
        arrays = {name: as_numpy(t) for name, t in tensors.items() if t is not None}
        names = {str(class_id): name for class_id, name in self.names.items()}
        facts = {**self.to_dict(), "channels_last": self.channels_last, "names": names}
        facts |= {"is_relevance": self.is_relevance, "plane": self.plane}
        facts["layout"] = None if self.layout is None else asdict(self.layout)
        with published(path) as aside:
            aside.write_bytes(save(arrays, {"undertow": json.dumps(facts)}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Attribution":
        """Read what `save` wrote. Arrays are NumPy's; values of several inputs come in a dict under their paths.

        Raises:
            InputError: the file is missing, or none that `save` wrote.

        >>> import tempfile
        >>> a = Attribution(np.ones((1, 2), np.float32), np.array([3]), np.array([0.5]), "guided")
        >>> Attribution.load(a.save(tempfile.mkdtemp() + "/a.safetensors")).rule
        'guided'
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
                facts = json.loads((file.metadata() or {})["undertow"])
            values = {name.removeprefix("values."): a for name, a in arrays.items() if name.startswith("values")}
            known = {field.name for field in fields(cls)} - {"values", "targets", "scores", "completeness", "token_ids"}
            facts["at"] = tuple(facts.get("at", ()))  # JSON has no tuples, and keys are text
            facts["plane"] = tuple(facts.get("plane", ()))
            layout = facts.get("layout")
            facts["layout"] = None if layout is None else Layout(**{**layout, "grid": tuple(layout["grid"])})
            facts["names"] = {int(class_id): str(name) for class_id, name in facts.get("names", {}).items()}
            return cls(
                values=values.get("values", values),
                targets=arrays.get("targets"),
                scores=arrays["scores"],
                completeness=arrays.get("completeness"),
                token_ids=arrays.get("token_ids"),
                **{name: value for name, value in facts.items() if name in known},
            )
        except FileNotFoundError as error:
            raise InputError(f"there is no file {printable(path)}; .save(path) writes an attribution") from error
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{printable(path)} holds no saved attribution; write one with .save(path)") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tensors, ready for JSON."""
        names = ["rule", "estimator", "through", "activations", "rewired", "switches", "skipped", "opaque"]
        names += ["acting", "head", "at"]
        return {name: getattr(self, name) for name in names}
