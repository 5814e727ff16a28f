"""Weights: read without running code, loaded completely or not at all, and identified by a digest."""

import hashlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ...errors import ModelError, printable, text_of
from .internals import COMPILED_PREFIX

_NESTED = ("state_dict", "model_state_dict", "model")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from `.safetensors`, or from a file of `torch.save`, without running any code in it.

    A checkpoint's "state_dict", "model" or "model_state_dict" is taken out; the prefixes that DataParallel and
    torch.compile put before each name are taken off.

    Raises:
        ModelError: the file is missing, unreadable, or holds anything but ordinary tensors: sparse, quantised and
            nested ones, and such without values, are none.
    """
    name = printable(path)
    if not path.is_file() or path.stat().st_size == 0:
        raise ModelError(f"no weights in {name}: {'it is empty' if path.is_file() else 'there is no such file'}")
    content = _load(path, name)
    for _ in _NESTED:  # pickle keeps a mapping that holds itself
        key = next((key for key in _NESTED if isinstance(content, Mapping) and key in content), None)
        content = content[key] if key is not None else content
    state = {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{name} holds no state dict ({_describe(content)}); save model.state_dict() or safetensors")
    for key, value in state.items():
        if kind := _extraordinary(value):
            raise ModelError(f"{name} holds {kind} weights ({printable(key)}); save dense ones, with their values")
    for prefix in (COMPILED_PREFIX, "module.", COMPILED_PREFIX):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _load(path: Path, name: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = text_of(error)
        if "Unsupported" in text or "TorchScript" in text or "global" in text.lower():
            raise ModelError(f"{name} contains code or objects, which are never unpickled; save model.state_dict() "
                             "or safetensors") from error  # fmt: skip
        raise ModelError(f"{name} is no readable weights file; save model.state_dict() or safetensors") from error


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    others = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    return f"not tensors: {printable(', '.join(others[:3]))}" if others else "nothing in it"


def _extraordinary(value: torch.Tensor) -> str:
    """Say what keeps a tensor from being copied as a dense one; empty where nothing does."""
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return "sparse"
    if value.is_meta:
        return "meta"
    return "quantised" if value.is_quantized else ""


def _is_kept(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether values keep their meaning in another dtype: floating point may be rounded, whole numbers must not be."""
    if value.dtype == dtype:
        return True
    if value.is_complex() or dtype.is_complex:
        return value.is_complex() and dtype.is_complex
    cast = value.to(dtype)
    if value.is_floating_point() and dtype.is_floating_point:
        return bool((cast.double().isfinite() | ~value.double().isfinite()).all())
    wide = value.double() if value.is_floating_point() else value
    return bool((cast.to(wide.dtype) == wide).all())


def fit(module: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path, reference: str) -> None:
    """Load a state dict into a module, all of it.

    Raises:
        ModelError: naming the tensors that are missing, unexpected, of another shape, or of a dtype from which they
            cannot be had whole, such as complex for a real one.
    """
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    sized = {key: value for key, value in own.items() if not torch.nn.parameter.is_lazy(value)}
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in sized.items()
        if key in state and state[key].shape != value.shape
    ]
    losing = [
        f"{key} is {str(state[key].dtype).removeprefix('torch.')}, not {str(value.dtype).removeprefix('torch.')}"
        for key, value in sized.items()
        if key in state and state[key].shape == value.shape and not _is_kept(state[key], value.dtype)
    ]
    if losing:
        more = ", ..." * (len(losing) > 3)
        raise ModelError(f"{printable(path)} would lose values in {reference}: {', '.join(losing[:3])}{more}")
    fitting = {key: value for key, value in state.items() if key not in sized or value.shape == sized[key].shape}
    result = module.load_state_dict(fitting, strict=False)
    missing = [key for key in result.missing_keys if key not in state]
    groups = [("missing", missing), ("unexpected", result.unexpected_keys), ("of another shape", shapes)]
    faults = [
        f"{len(keys)} {fault} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})" for fault, keys in groups if keys
    ]
    if faults:
        remedy = "for a changed network use FILE.py:FUNCTION"
        raise ModelError(f"{printable(path)} does not fit {reference}: {'; '.join(faults)}; {remedy}")


def weights_sha256(module: torch.nn.Module) -> str:
    """Return the SHA-256 of a module's weights, the same whatever file they came from.

    Raises:
        ModelError: a tensor is sparse, nested, quantised, or without values.

    It is over each tensor of the state dict, sorted by name: the name, the dtype ("float32") and the shape
    ("64x3x3x3") as UTF-8, each ended by a zero byte; then the values in C order, little-endian.

    >>> weights_sha256(torch.nn.Identity())[:12]  # no weights
    'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            if not torch.nn.parameter.is_lazy(value) and (kind := _extraordinary(value)):
                raise ModelError(
                    f"the network has {kind} weights ({printable(name)}); only dense ones can be explained"
                )
            shape = "x".join(map(str, value.shape))
            digest.update(f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{shape}\0".encode())
            digest.update(_little_endian(value))
    return digest.hexdigest()


def _little_endian(value: torch.Tensor) -> Any:
    raw = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw if sys.byteorder == "little" else raw.reshape(-1, value.element_size())[:, ::-1].tobytes()
