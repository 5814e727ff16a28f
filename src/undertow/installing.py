"""What to type so that an extra is there."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra.

    It is the same for each way in which this package may have been installed: pip finds it there, from an index, a
    checkout or an archive, leaves it as it is, and installs what the extra asks for.

    >>> install_command("record")
    'pip install "undertow[record]"'
    """
    return f'pip install "undertow[{extra}]"'
