"""What to type so that an extra is there."""

_BROUGHT = {"torch": "torch", "torchvision": "vision", "timm": "vision", "keras": "keras", "tensorflow": "keras"}
_BROUGHT |= {"jax": "jax", "transformers": "text", "open_clip": "clip"}
"""Of packages that a person's own file may import, the extra that brings them."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra.

    It is the same for each way in which this package may have been installed: pip finds it there, from an index, a
    checkout or an archive, leaves it as it is, and installs what the extra asks for.

    >>> install_command("record")
    'pip install "undertow[record]"'
    """
    return f'pip install "undertow[{extra}]"'


def remedy_of(error: BaseException) -> str:
    """Return what helps where somebody's own code has failed: what to install, or that it is to be corrected.

    >>> remedy_of(ModuleNotFoundError("No module named 'timm.models'", name="timm.models"))
    'run: pip install "undertow[vision]"'
    >>> remedy_of(ZeroDivisionError())
    'correct it, then try again'
    """
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"run: {install_command(_BROUGHT[missing])}" if missing in _BROUGHT else "correct it, then try again"
