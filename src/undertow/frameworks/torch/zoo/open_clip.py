"""Networks of open_clip, by architecture and weights, or from a folder, that score the texts of a user's classes."""

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....classifier import RANDOM, Classifier, Reference
from ....errors import ModelError, did_you_mean, one_line, printable
from ....images import Preprocessing
from ...downloading import downloaded, unreachable
from ..weights import fit, read_state, weights_sha256
from .importing import import_package, import_torchvision
from .zero_shot import ZeroShot, features_of, texts_of

CONFIG = "open_clip_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def load_open_clip(name: str, file: Path | None, classes: str | Sequence[str] | None) -> Classifier:
    """Load `open_clip:ARCHITECTURE@TAG`, or `@FILE` of weights, or `@none`; or `open_clip:FOLDER[@none]`.

    Args:
        name: what stands behind "open_clip:".
        file: weights to use instead.
        classes: as `texts_of` takes them.

    Raises:
        FrameworkError: open_clip is missing.
        ModelError: there is no such architecture, weights or tokenizer, or no classes.
    """
    reference = f"open_clip:{printable(name)}"
    base, _, choice = (name, "", "") if Path(name).expanduser().is_dir() else name.partition("@")
    folder = Path(base).expanduser()
    if choice not in ("", "none") and Path(choice).expanduser().is_file():
        file = file or Path(choice).expanduser()
    library = _open_clip()
    known = f"local-dir:{folder}" if base and folder.is_dir() else base
    _refuse_unknown(library, known, choice, file)
    names, texts = texts_of(classes, reference)
    with _quiet():
        model, weights = _model(library, known, choice, file, reference)
        features = _features(library, known, model, texts, reference)
    bias = 0.0 if model.logit_bias is None else float(model.logit_bias.detach())
    module = ZeroShot(model.visual, nn.Identity(), features, float(model.logit_scale.detach().exp()), bias).eval()
    return Classifier(
        f"open_clip:{name}",
        module,
        _preprocessing(model.visual.preprocess_cfg, reference),
        tuple(row[0] for row in names),
        weights,
        weights_sha256(module),
        tuple(row[1:] for row in names),
        "open_clip's",
    )


def _open_clip() -> Any:
    import_torchvision()
    return import_package("open_clip", "clip")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what open_clip logs from the root logger, to which it would also add a handler."""

    def others(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)
        root.removeHandler(handler)


def _refuse_unknown(library: Any, name: str, choice: str, file: Path | None) -> None:
    """Refuse what open_clip does not know, before anything is loaded.

    Raises:
        ModelError: no such architecture, folder, weights.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / CONFIG).is_file():
            raise ModelError(f"open_clip:{printable(folder)} has no {CONFIG}; open_clip's push_to_hf_hub writes one")
        if not file and choice != "none" and _file_in(folder) is None:
            raise ModelError(f"open_clip:{printable(folder)} has no weights; add {', '.join(_WEIGHTS)}, or write @none")
        return
    if name not in library.list_models():
        hint = did_you_mean(name, library.list_models()) or "; `undertow models open_clip:` lists them"
        raise ModelError(f"open_clip has no architecture '{printable(name)}', and no folder is there{hint}")
    if file or choice == "none":
        return
    tags = library.list_pretrained_tags_by_model(name)
    if not choice:
        raise ModelError(f"open_clip:{name} needs weights: {', '.join(f'@{tag}' for tag in (*tags, 'FILE', 'none'))}")
    if not library.get_pretrained_cfg(name, choice):
        hint = did_you_mean(choice, tags) or f"; it has {', '.join((*tags, 'none'))}"
        raise ModelError(f"open_clip:{name} has no weights '{printable(choice)}', and no file is there{hint}")


def _model(library: Any, name: str, choice: str, file: Path | None, reference: str) -> tuple[Any, str]:
    """Build the network, float32, with its weights, those of a file, or random ones; and say which."""
    own = {"pretrained_image": False, "pretrained_text": False, "precision": "fp32"}
    if name.startswith("local-dir:") and not file and choice != "none":
        file = _file_in(Path(name.removeprefix("local-dir:")))
    if file or choice == "none":
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                model = library.create_model(name, load_weights=False, **own)
        except Exception as error:
            raise ModelError(
                f"could not build {reference} ({one_line(error)[:300]}); check its configuration"
            ) from error
        if file:
            fit(model, read_state(file), file, reference)
        return model.eval(), file.name if file else RANDOM
    cfg = library.get_pretrained_cfg(name, choice)
    cached, url = _source(cfg)
    quick = bool(cfg.get("quick_gelu"))  # the weights say so where the architecture does not
    model = downloaded(
        reference,
        None if cached else url,
        lambda: library.create_model(name, pretrained=choice, force_quick_gelu=quick, require_pretrained=True, **own),
    )
    return model.eval(), choice


def _file_in(folder: Path) -> Path | None:
    """Return the file of weights in a folder; safetensors first, and open_clip's own name before others."""
    files = [path for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]
    return min(files, key=lambda path: not path.stem.startswith("open_clip"), default=None)


def _source(cfg: dict[str, Any]) -> tuple[bool, str]:
    """Whether weights are on this machine already, and the address that they come from."""
    if not cfg.get("hf_hub"):
        url = str(cfg.get("url", ""))
        return Path("~/.cache/clip", os.path.basename(url)).expanduser().is_file(), url
    import huggingface_hub

    repository, _, filename = str(cfg["hf_hub"]).rpartition("/")
    names = [filename] if filename else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = any(isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in names)
    return cached, huggingface_hub.hf_hub_url(repository, names[-1])


def _features(library: Any, name: str, model: Any, texts: Sequence[str], reference: str) -> torch.Tensor:
    """Return the texts' features, by the network's own tokenizer.

    Raises:
        ModelError: the tokenizer cannot be had, or a text is too long.
    """
    config = library.get_model_config(name)["text_cfg"]
    hub_name = "" if name.startswith("local-dir:") else config.get("hf_tokenizer_name", "")
    try:
        if hub_name and (reason := _unavailable(hub_name)):
            raise OSError(f"{hub_name}: {reason}")
        tokenizer = library.get_tokenizer(name)
    except Exception as error:
        raise ModelError(
            f"could not load the tokenizer of {reference} ({one_line(error)[:300]}); save it beside {CONFIG}, and give "
            "open_clip:FOLDER"
        ) from error
    return features_of(texts, tokenizer, model.encode_text)


def _unavailable(name: str) -> str:
    """Return why a tokenizer of the hub cannot be had, or "": it is in the cache, or the hub answers."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer_config.json")
    return "" if isinstance(cached, str) else unreachable(huggingface_hub.constants.ENDPOINT)


def _preprocessing(cfg: dict[str, Any], reference: str) -> Preprocessing:
    """Return what open_clip's evaluation transform does.

    Raises:
        ModelError: it does what no `Preprocessing` says.
    """
    size, mode = cfg["size"], cfg["resize_mode"]
    height, width = (size, size) if isinstance(size, int) else size
    if mode == "longest" or (mode == "shortest" and height != width):
        raise ModelError(
            f"{reference} resizes a photograph to {height} x {width} by its {mode} side, which is not supported here; "
            "return the network from FILE.py:FUNCTION, with a Preprocessing that suits it"
        )
    resize = (height, width) if mode == "squash" else height
    interpolation = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
    mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
    return Preprocessing(resize, (height, width), mean, std, interpolation)


def architectures() -> list[str]:
    """Return the names of open_clip's architectures, read off its files: its import takes seconds. Else none."""
    spec = importlib.util.find_spec("open_clip")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return sorted(path.stem for path in folder.glob("model_configs/*.json")) if folder else []


def rows_of_open_clip(word: str | None) -> list[Reference]:
    """Return the rows of `undertow models` for "open_clip".

    Raises:
        FrameworkError: open_clip is missing.
    """
    library = _open_clip()
    if not word:
        why = f"{len(library.list_models())} architectures that score texts; needs --classes"
        return [Reference("open_clip:NAME@TAG", "open_clip", "", False, why)]
    part = word.lower().removeprefix("open_clip:")
    rows = [Reference(f"open_clip:{name}@none", "open_clip", RANDOM, True, "nothing to download")
            for name in library.list_models()]  # fmt: skip
    for name, tag in library.list_pretrained():
        cached, _ = _source(library.get_pretrained_cfg(name, tag))
        why = "downloaded already" if cached else "needs a download"
        rows.append(Reference(f"open_clip:{name}@{tag}", "open_clip", tag, cached, why))
    return sorted((row for row in rows if part in row.reference.lower()), key=lambda row: row.reference)
