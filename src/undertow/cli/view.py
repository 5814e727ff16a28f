"""`undertow view`: the page of runs, on this machine, while they are written."""

from collections.abc import Sequence
from pathlib import Path

import click

from .printing import echo


@click.command(
    short_help="The same page, live, while a run is written.",
    epilog="\b\nExamples:\n  undertow view runs/a\n  undertow view runs/a runs/b --open",
)
@click.argument("what", metavar="WHAT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Default: one that is free.")
@click.option("--open", "open_browser", is_flag=True, help="Open it in the browser.")
@click.option("--title", default="undertow", show_default=True)
def view(what: Sequence[Path], port: int, open_browser: bool, title: str) -> int:
    """Serve the page of WHAT, as `undertow report` writes it, to this machine alone, until Ctrl-C.

    While a run is being written, new batches and findings appear without a reload. The address holds a random token,
    without which nothing is served.
    """
    import webbrowser

    from ..errors import InputError
    from ..page.serving import LivePage, PageServer

    live = LivePage(what, title)
    try:
        server = PageServer(live, port)
    except OSError as error:
        raise InputError(
            f"port {port} cannot be used ({error.strerror}); leave out --port, or choose another"
        ) from error
    with server:
        echo(f"{server.address}\nCtrl-C ends it.")
        if open_browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            echo("ended", err=True)
    return 0
