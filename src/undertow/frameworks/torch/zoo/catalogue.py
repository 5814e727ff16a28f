"""The classifiers of torchvision, timm and other libraries, and which weights are on this machine already."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ....classifier import RANDOM, Reference
from ....errors import FrameworkError
from .hugging_face import rows_of_hub
from .importing import import_timm, import_torchvision
from .open_clip import architectures, rows_of_open_clip


def names() -> list[str]:
    """Return every model of torchvision, timm and open_clip as a reference without weights; of what is installed."""
    models = import_torchvision().models
    references = [f"torchvision:{name}" for name in models.list_models(module=models)]
    with suppress(FrameworkError):
        references += [f"timm:{name}" for name in import_timm().list_models()]
    return references + [f"open_clip:{name}" for name in architectures()]


def rows(source: str, word: str | None) -> list[Reference]:
    """Return the rows of `undertow.models.listing` for "torchvision", "timm", "hf" or "open_clip".

    Raises:
        FrameworkError: the package is missing.
    """
    if source in ("hf", "open_clip"):
        return rows_of_hub(word) if source == "hf" else rows_of_open_clip(word)
    every = _torchvision_rows() if source == "torchvision" else _timm_rows(word)
    if word:
        return [row for row in every if word.lower() in row.reference.lower()]
    return [row for row in every if "@" not in row.reference or "NAME" in row.reference]


def _torchvision_rows() -> list[Reference]:
    models = import_torchvision().models
    rows = [Reference("torchvision:NAME@none", "torchvision", RANDOM, True, "any of these; nothing to download")]
    for name in models.list_models(module=models):
        entries = models.get_model_weights(name)
        for entry in entries:
            choice = "" if entry is entries.DEFAULT else entry.name
            if entry.meta["categories"]:
                offline, why = _offline(file_in_hub(entry.url))
                rows.append(
                    Reference(reference_of("torchvision", name, choice), "torchvision", entry.name, offline, why)
                )
        rows.append(Reference(f"torchvision:{name}@none", "torchvision", RANDOM, True, "nothing to download"))
    return rows


def _timm_rows(word: str | None) -> list[Reference]:
    timm = import_timm()
    if not word:
        why = f"{len(timm.list_models()):,} models; add a part of a name to list those that have it"
        return [Reference("timm:NAME", "timm", "", False, why)]
    part = word.lower().removeprefix("timm:").partition("@")[0]
    untrained = [f"timm:{name}@none" for name in timm.list_models() if part in name]
    rows = [Reference(name, "timm", RANDOM, True, "nothing to download") for name in untrained]
    for name in timm.list_models(pretrained=True):
        cfg = timm.models.get_pretrained_cfg(name)
        if part in name and cfg.num_classes:
            offline, why = _offline(file_in_hugging_face(cfg)[0])
            rows.append(Reference(f"timm:{name}", "timm", cfg.tag or name, offline, why))
    return sorted(rows, key=lambda row: row.reference)


def _offline(cached: str | None) -> tuple[bool, str]:
    return cached is not None, "downloaded already" if cached else "needs a download"


def file_in_hub(url: str) -> str | None:
    """Return the file in torch's cache that an address was downloaded to; None where it was not."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    return str(path) if path.is_file() else None


def file_in_hugging_face(cfg: Any) -> tuple[str | None, str]:
    """Return the weights' file in a cache, None where it is not there, and the address that it comes from."""
    if not cfg.hf_hub_id:
        return file_in_hub(cfg.url), cfg.url
    import huggingface_hub

    repository, _, revision = cfg.hf_hub_id.partition("@")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    cached = (huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    file = next((path for path in cached if isinstance(path, str)), None)
    return file, huggingface_hub.hf_hub_url(repository, names[0], revision=revision or None)


def reference_of(source: str, name: str, choice: str) -> str:
    """Write a reference."""
    return f"{source}:{name}" + (f"@{choice}" if choice else "")
