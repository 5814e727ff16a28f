"""One offline HTML page of what was explained, recorded and traced: `report`. Never runs a model."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from ..attribution import Attribution, ExplainedText
from ..derive.blocks import Blocks
from ..errors import InputError, printable
from ..files import to_json
from ..recording.trace import Trace
from ..runs import Run
from ..verdict import Verdict
from . import explanations, flow, gradients
from .packing import PackedArrays
from .text import Text as Text
from .text import folders_of_texts, texts_of_folder
from .writing import write_page


def report(
    *what: Any, path: str | os.PathLike[str] = "report.html", title: str = "undertow", command: str = ""
) -> Path:
    """Write one HTML file that shows everything at a glance, asks for nothing, and can be mailed.

    Args:
        what: in any order and number: folders that `undertow explain` or `undertow trust` wrote (of one photograph, or
            the folder around several), folders of runs, a `Run`, an `Attribution` of images, a `Verdict`, an
            `ExplainedText`, a `Text` of tokens, a network as `ut.derive.from_model` returns it, or a pair of that and a
            `Trace`.
        path: of the page, ending in .html; replaced.
        title: at its top.
        command: what it was made by, to be told in the page, such as "undertow report runs/a".

    Raises:
        InputError: something that cannot be shown, or nothing; nothing is written.
        RunError: a file of a run is damaged.
        FrameworkError: jinja2 or vl-convert-python is missing.

    >>> import tempfile
    >>> page = report(Text(["a", " cat"], [0.1, 2.0]), path=tempfile.mkdtemp() + "/text.html")
    >>> " cat" in page.read_text(encoding="utf-8")
    True
    """
    path, arrays = check_ending(path), PackedArrays()
    return write_page(path, contents(what, arrays, title, command), arrays.texts)


def check_ending(path: str | os.PathLike[str]) -> Path:
    """Return the path of a page: a file of another kind, such as a photograph, is never replaced by one.

    Raises:
        InputError: it does not end in .html or .htm.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{printable(path)} must end in .html, as a page does")
    return path


def contents(what: Any, arrays: PackedArrays, title: str, command: str = "") -> dict[str, Any]:
    """Return all that a page shows, as plain data."""
    cards: list[dict[str, Any]] = []
    runs: list[Run] = []
    networks: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for one in what:
        if isinstance(one, str | os.PathLike):
            found, run, of_texts = _at(Path(one))
            cards += found
            runs += [run] if run else []
            texts += of_texts
        elif isinstance(one, Run):
            runs.append(one)
        elif isinstance(one, Attribution):
            cards += explanations.cards_of_attribution(one)
        elif isinstance(one, Verdict):
            cards.append(explanations.card_of_verdict(one))
        elif isinstance(one, Text):
            texts.append(one.to_dict())
        elif isinstance(one, ExplainedText):
            texts += [Text(t.tokens, t.values, t.title).to_dict() for t in one.all_tokens()]
        elif isinstance(one, Blocks):
            networks.append(flow.of_blocks(one))
        elif isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], Blocks) and isinstance(one[1], Trace):
            networks.append(flow.of_blocks(*one))
        else:
            raise InputError(
                f"a {type(one).__name__} has no place in a page; give folders, or a Run, Attribution, Verdict, Text, "
                "ut.derive.from_model(...), or that and a Trace in a tuple"
            )
    if not (cards or runs or networks or texts):
        raise InputError("there is nothing to show; give the folder of a run, or what undertow explain wrote")
    networks += [graph for i, run in enumerate(runs) if (graph := flow.of_run(run, i))]
    return {
        "title": title,
        "explanations": explanations.section(cards, arrays),
        "gradients": gradients.section(runs, arrays),
        "flow": networks,
        "text": texts,
        "made": [*_made_of(cards), *map(_made_of_run, runs), _page_facts(command)],
        "live": None,
    }


def _at(path: Path) -> tuple[list[dict[str, Any]], Run | None, list[dict[str, Any]]]:
    """Return the cards of a folder, its run, and its texts."""
    if not path.exists():
        raise InputError(f"{printable(path)} is not there; check the name")
    if (path / "manifest.json").is_file():
        return [], Run(path), []
    if (path / "sweep.json").is_file() and not (path / "pictures").is_dir():
        raise InputError(
            f"{printable(path)} is a sweep without pictures; add --pictures N to its command, or read .map()"
        )
    folders = explanations.folders_of(path / "pictures" if (path / "sweep.json").is_file() else path)
    of_texts = [text.to_dict() for folder in folders_of_texts(path) for text in texts_of_folder(folder)]
    if not folders and not of_texts:
        raise InputError(f"{printable(path)} is neither a run nor what undertow explain or trust writes")
    return [explanations.card_of_folder(folder) for folder in folders], None, of_texts


def _made_of(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how maps were made, once where it is the same for several photographs."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for card in cards:
        groups.setdefault(to_json(card["made"]), ([], card["made"]))[0].append(card["name"])
    return [{"title": f"maps of {', '.join(names[:5])}{' and others' * (len(names) > 5)}", "facts": facts}
            for names, facts in groups.values()]  # fmt: skip


def _made_of_run(run: Run) -> dict[str, Any]:
    hidden = ("sites", "tables", "parameters", "unreached")
    facts = {key: value for key, value in run.manifest.items() if key not in hidden}
    return {"title": f"run {run.folder.resolve().name}", "facts": facts}


def _page_facts(command: str) -> dict[str, Any]:
    from ..photographs import versions

    written = {"written": datetime.now().astimezone().isoformat(timespec="minutes")}
    return {"title": "this page", "facts": ({"command": command} if command else {}) | written | versions()}
