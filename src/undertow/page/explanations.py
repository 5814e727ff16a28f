"""Explained photographs as plain data for a page: from what `explain` and `trust` write, or return."""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attribution import Attribution
from ..errors import InputError, one_line, printable
from ..files import read_bytes, readable
from ..photographs import PHOTOGRAPH
from ..show import heatmap
from ..verdict import Verdict
from ..verdict.photograph import map_file
from .packing import PackedArrays

MAX_IN_COLOUR = 24
"""With more maps in a page, each has two numbers a pixel (magnitude and sum) in the place of all its channels."""
MAX_JSON_BYTES = 32 << 20
MAX_MAP_BYTES = 512 << 20
RESULT, VERDICT = "result.json", "verdict.json"


def folders_of(path: Path) -> list[Path]:
    """Return the folders of explained or judged photographs: the path itself, or those in it; none if it is neither."""
    if _is_result(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if _is_result(folder)) if path.is_dir() else []


def _is_result(folder: Path) -> bool:
    return (folder / RESULT).is_file() or (folder / VERDICT).is_file()


def card_of_folder(folder: Path) -> dict[str, Any]:
    """Return what a folder says of one photograph, its maps as arrays `(C, H, W)`.

    Raises:
        InputError: a file is missing, or is not as `undertow explain` or `undertow trust` writes it.
    """
    judged = not (folder / RESULT).is_file()
    path = folder / (VERDICT if judged else RESULT)
    try:
        facts = json.loads(read_bytes(path, MAX_JSON_BYTES))
        maps = list(_judged_maps(folder, facts) if judged else _explained_maps(folder, facts))
        return _card(
            Path(facts["photograph"]).name,
            facts.get("targets") or _targets(facts["verdicts"]),
            maps,
            {key: value for key, value in facts.items() if key not in _SHOWN},
            photograph=_photograph(folder),
            predictions=facts.get("predictions", []),
            notes=facts.get("notes", []),
            verdicts=facts.get("verdicts", {}),
        )
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{printable(path)} is not as undertow writes it ({type(error).__name__}: {one_line(error)[:120]}); "
            f"explain the photograph again"
        ) from error


_SHOWN = ("predictions", "targets", "verdicts", "notes", "files", "rules", "photograph")


def _card(
    name: str,
    targets: Iterable[Mapping[str, Any]],
    maps: list[dict[str, Any]],
    made: dict[str, Any],
    *,
    photograph: npt.NDArray[np.uint8] | None = None,
    predictions: Iterable[Mapping[str, Any]] = (),
    notes: Iterable[str] = (),
    verdicts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what is shown of one photograph, in the types that the page's script counts on.

    Raises:
        TypeError, ValueError, LookupError, AttributeError: a part has another type.
    """
    return {
        "name": name,
        "photograph": photograph,
        "predictions": [
            {"name": str(p["name"]), "score": float(p["score"]), "probability": _number(p.get("probability"))}
            for p in predictions
        ],
        "targets": [
            {"name": str(t["name"]), "class": int(t["class"]), "score": _number(t.get("score"))} for t in targets
        ],
        "maps": maps,
        "notes": [str(note) for note in notes],
        "verdicts": {_key(str(v["rule"]), str(v["estimator"])): _verdict(v) for v in verdicts.values()},
        "made": made,
    }


def _verdict(plain: Mapping[str, Any]) -> dict[str, Any]:
    answers = plain["answers"].items()
    return {
        "class": int(plain["target"]),
        "sentence": str(plain["sentence"]),
        "answers": [{"question": q, "level": str(a["level"]), "sentence": str(a["sentence"])} for q, a in answers],
        "unanswered": {question: str(why) for question, why in plain.get("unanswered", {}).items()},
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _targets(verdicts: Mapping[str, Any]) -> list[dict[str, Any]]:
    first = next(iter(verdicts.values()))
    return [{"class": first["target"], "name": first["target_name"]}]


def _key(rule: str, estimator: str) -> str:
    return rule if estimator == "gradient" else f"{rule}, {estimator}"


def _explained_maps(folder: Path, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    reverse = facts["preprocessing"].get("order") == "BGR"
    for name, how in facts["rules"].items():
        attribution = Attribution.load(_own(folder / f"{readable(name)}.safetensors"))
        for k in range(len(facts["targets"])):
            values = attribution.map(0, k)
            yield _map(values[::-1] if reverse else values, k, how)


def _judged_maps(folder: Path, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the maps of judged rules; folders of before there were any have none."""
    for name, verdict in facts["verdicts"].items():
        path = folder / map_file(name)
        if path.is_file():
            with io.BytesIO(read_bytes(path, MAX_MAP_BYTES)) as file:
                yield _map(np.load(file, allow_pickle=False), 0, verdict)


def _map(values: npt.NDArray[Any], target: int, how: Mapping[str, Any]) -> dict[str, Any]:
    if values.ndim != 3 or not np.isfinite(values).all():
        raise ValueError(f"a map of shape {values.shape} with NaN or infinity, or not of one image")
    return {
        "key": _key(str(how["rule"]), str(how["estimator"])),
        "rule": str(how["rule"]),
        "estimator": str(how["estimator"]),
        "target": target,
        "rewired": int(how.get("rewired", 0)),
        "head": str(how.get("head", "as is")),
        "values": values,
    }


def _photograph(folder: Path) -> npt.NDArray[np.uint8] | None:
    """Return the photograph as the network saw it; None in a folder of before it was kept there."""
    from ..images import read

    path = folder / PHOTOGRAPH
    return np.asarray(read(_own(path))) if path.is_file() else None


def _own(path: Path) -> Path:
    """Return the path of a file in the folder itself: no link to another, and none that is too large.

    Raises:
        ValueError: it is one.
    """
    if path.is_symlink():
        raise ValueError(f"{path.name} is a link")
    if path.stat().st_size > MAX_MAP_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, over {MAX_MAP_BYTES:,}")
    return path


def cards_of_attribution(attribution: Attribution, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return a card for each sample of a batch of images.

    Raises:
        InputError: it is of no images.
    """
    from ..frameworks.base import as_numpy

    if attribution.targets is None:
        raise InputError("an attribution of a target function has no class to show; explain a class, or draw .image()")
    classes, scores = as_numpy(attribution.targets), as_numpy(attribution.scores)
    classes, scores = classes.reshape(len(classes), -1), scores.reshape(len(scores), -1)
    plain = attribution.to_dict()
    cards = []
    for sample in range(len(classes)):
        maps = [_map(attribution.map(sample, k), k, plain) for k in range(classes.shape[1])]
        targets = [
            {"class": c, "name": names[c] if c < len(names) else "", "score": score}
            for c, score in zip(classes[sample].tolist(), scores[sample].tolist(), strict=True)
        ]
        cards.append(_card(f"sample {sample}", targets, maps, {name: value for name, value in plain.items() if value}))
    return cards


def card_of_verdict(verdict: Verdict) -> dict[str, Any]:
    """Return a card with a verdict and the map that it is of."""
    plain = verdict.to_dict()
    maps = [] if verdict.values is None else [_map(verdict.values, 0, plain)]
    made = {"seed": verdict.seed, "samples": verdict.samples, "passes": verdict.passes}
    return _card(verdict.target_name, _targets({"": plain}), maps, made, verdicts={"": plain})


def merged(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the cards of one photograph and one network, so that their rules and estimators stand in one place.

    A map of the same rule, estimator and class is kept once, the first; a verdict likewise.
    """
    by_photograph: dict[Any, dict[str, Any]] = {}
    for card in cards:
        pixels = None if card["photograph"] is None else card["photograph"].tobytes()
        key = id(card) if pixels is None else (card["name"], pixels, card["made"].get("weights_sha256"))
        first = by_photograph.setdefault(key, {**card, "targets": [], "maps": [], "notes": [], "verdicts": {}})
        first["predictions"] = first["predictions"] or card["predictions"]
        first["targets"] += [t for t in card["targets"] if t["class"] not in [s["class"] for s in first["targets"]]]
        first["notes"] += [note for note in card["notes"] if note not in first["notes"]]
        first["verdicts"] = card["verdicts"] | first["verdicts"]
        classes = [target["class"] for target in first["targets"]]
        had = {(one["key"], one["target"]) for one in first["maps"]}
        maps = [{**one, "target": classes.index(card["targets"][one["target"]]["class"])} for one in card["maps"]]
        first["maps"] += [one for one in maps if (one["key"], one["target"]) not in had]
    return list(by_photograph.values())


def section(cards: Sequence[dict[str, Any]], arrays: PackedArrays) -> dict[str, Any]:
    """Return all cards, as the page's script reads them."""
    cards = merged(cards)
    in_colour = sum(len(card["maps"]) for card in cards) <= MAX_IN_COLOUR
    return {
        "in_colour": in_colour,
        "colour": in_colour and any(one["values"].shape[0] in (1, 3) for card in cards for one in card["maps"]),
        "cards": [
            {**{key: value for key, value in card.items() if key != "made"},
             "photograph": _jpeg(card["photograph"]),
             "maps": [_packed(one, in_colour, arrays) for one in card["maps"]]}
            for card in cards
        ],
    }  # fmt: skip


def _packed(one: dict[str, Any], in_colour: bool, arrays: PackedArrays) -> dict[str, Any]:
    """Pack a map: all its channels, or the largest |value| over them and their sum."""
    values = one["values"].astype(np.float32)
    tops = {style: heatmap.limit(values, style) for style in ("magnitude", "signed")}
    if not in_colour and len(values) > 1:
        values = np.stack([np.abs(values).max(0), values.sum(0)])
    facts = {key: value for key, value in one.items() if key != "values"}
    return {**facts, "reduced": not in_colour and len(one["values"]) > 1, "tops": tops, "values": arrays.floats(values)}


def _jpeg(pixels: npt.NDArray[np.uint8] | None) -> str | None:
    """Return a photograph as a data address."""
    if pixels is None:
        return None
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
