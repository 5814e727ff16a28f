"""What mkdocs is told beside `mkdocs.yml`: pages from elsewhere in the repository, notebooks, lessons, a page's place.

The repository can be read as it is, so its links lead to files (`../benchmarks/rules.md`). Here they become links of
the site.
"""

import inspect
import json
import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_lessons import shown, with_outputs

import undertow

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
ELSEWHERE |= {
    f"benchmarks/{path.name}": f"benchmarks/{path.name}"
    for pattern in ("*.md", "*.svg")
    for path in (ROOT / "benchmarks").glob(pattern)
}
"""Files of the repository outside docs/ that the site shows too, and where they stand in it."""

NOTEBOOKS = {f"docs/notebooks/{path.name}": path for path in ROOT.glob("docs/notebooks/*.ipynb")}
SHIM = "https://unpkg.com/iframe-worker/shim"
"""What the theme would fetch so that pages opened from the disk can be searched; `offline_search.js` does that here."""

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#|mailto:)(?P<target>[^)\s]+)\)")
NAME = re.compile(r"^::: undertow\.([\w.]+)$", re.M)
LESSON = re.compile(r"course/\d")
FENCE = re.compile(r"(^```.*?^```$)", re.S | re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and give each page a place."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for source, path in NOTEBOOKS.items():
        files.append(File.generated(config, _page_of(source), content=page_of_notebook(path)))
    names = _names_without_a_page(files)
    if names:
        text = "# More\n\n" + "".join(f"::: undertow.{name}\n\n" for name in names)
        files.append(File.generated(config, "api/more.md", content=text))
    config.nav = nav_of(config.nav or [], [file.src_uri for file in files.documentation_pages()])
    return files


def nav_of(nav: list[Any], pages: list[str]) -> list[Any]:
    """Replace patterns by the pages that are there, each in its first place, and add a section of those left over.

    Args:
        nav: as `mkdocs.yml` has it: sections, each a list of pages, patterns, or titles with a page.
        pages: that there are.
    """
    sections = [(title, entries) for section in nav for title, entries in section.items()]
    named = {path_of(entry) for _, entries in sections for entry in entries}
    left = [page for page in sorted(pages) if page not in named]  # a pattern takes what is not named
    placed = []
    for title, entries in sections:
        there: list[Any] = []
        for entry in entries:
            found = [page for page in left if fnmatch(page, path_of(entry))]
            left = [page for page in left if page not in found]
            there += [entry] if path_of(entry) in pages else found
        placed += [{title: there}] if there else []
    return [*placed, *([{"More": left}] if left else [])]


def path_of(entry: str | dict[str, str]) -> str:
    """Return the page or the pattern of an entry, which may have a title."""
    return entry if isinstance(entry, str) else next(iter(entry.values()))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages, and public names into their docstrings.

    What a link leads to that is no page becomes its text.
    """
    if page.file.src_uri.startswith("api/"):
        markdown = markdown.replace("::: undertow\n", "\n".join(rows_of_names()) + "\n")
        return NAME.sub(lambda match: "\n\n".join(docstrings_of(match[1])), markdown)
    source = _source_of(page.file.src_uri)
    if "title" not in page.meta and (heading := re.search(r"^# ([^:\n]+):", markdown, re.M)):
        page.meta["title"] = heading[1]  # "Explain" of "Explain: which pixels spoke for a class"

    def link(match: re.Match[str]) -> str:
        path, _, anchor = match["target"].partition("#")
        target = _page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if target is None:
            return match["text"]
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match['image']}[{match['text']}]({relative}{'#' * bool(anchor)}{anchor})"

    parts = FENCE.split(markdown)
    linked = "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))
    return with_outputs(linked, page.file.src_uri) if LESSON.match(page.file.src_uri) else linked


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Let a page fetch nothing."""
    return _without_shim(output, page.url)


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Let the page that stands for missing ones fetch nothing."""
    return _without_shim(output_content, template_name)


def _without_shim(html: str, url: str) -> str:
    return html.replace(SHIM, posixpath.relpath("offline_search.js", posixpath.dirname(url) or "."))


def _source_of(page: str) -> str:
    """Return the file of the repository that a page is made of."""
    return {there: source for source, there in ELSEWHERE.items()}.get(page, f"docs/{page}")


def _page_of(source: str) -> str | None:
    """Return the page or file of the site that a file of the repository becomes, or None."""
    if source in ELSEWHERE:
        return ELSEWHERE[source]
    if not source.startswith("docs/") or source.endswith(".py"):
        return None
    return source.removeprefix("docs/").replace(".ipynb", ".md")


def _names_without_a_page(files: Files) -> list[str]:
    """Return the public names that no page of the API has."""
    pages = [file for file in files.documentation_pages() if file.src_uri.startswith("api/")]
    shown = set(NAME.findall("\n".join(file.content_string for file in pages)))
    return [name for name in undertow.__all__ if name not in shown]


def rows_of_names() -> Iterator[str]:
    """Yield a table of all public names, each with the first sentence of its docstring."""
    yield "| name | |\n|---|---|"
    for name in undertow.__all__:
        thing = getattr(undertow, name)
        kind = _defined(thing)
        path = thing.__name__ if isinstance(thing, ModuleType) else f"{kind.__module__}.{kind.__qualname__}"
        first = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        yield f"| [`ut.{name}`][{path}] | {first} |"


def _defined(thing: Any) -> Any:
    """Return the function or class to show for a public name: for an object that is called, its class."""
    return thing if isinstance(thing, type) or inspect.isfunction(thing) else type(thing)


def docstrings_of(name: str, level: int = 2) -> Iterator[str]:
    """Yield what mkdocstrings is to show of a public name: where it is defined, for several share a file's name.

    Of a module these are the functions and classes that it defines, or, if it is a folder, that it gives out.
    """
    if name.partition(".")[0] not in undertow.__all__:
        yield f"::: undertow.{name}"  # as it is: importing it would import a framework
        return
    thing = attrgetter(name)(undertow)
    if isinstance(thing, ModuleType):
        yield f"{'#' * level} ut.{name} {{#{thing.__name__}}}\n\n{inspect.getdoc(thing)}"
        for part, member in vars(thing).items():
            is_its_own = getattr(member, "__module__", "").startswith(thing.__name__)
            if is_its_own and not part.startswith("_") and (inspect.isclass(member) or inspect.isfunction(member)):
                yield from docstrings_of(f"{name}.{part}", level + 1)
        return
    kind = _defined(thing)
    options = {"heading": f"ut.{name}", "toc_label": name.rpartition(".")[2], "heading_level": level}
    if kind is not thing:  # a callable object, such as ut.trust
        options["members"] = [part for part in vars(kind) if part == "__call__" or not part.startswith("_")]
        options["filters"] = []
    yield f"::: {kind.__module__}.{kind.__qualname__}\n    options: {json.dumps(options)}"


def page_of_notebook(path: Path) -> str:
    """Return a notebook as Markdown, with the outputs that it was saved with."""
    return "\n\n".join(_cells(nbformat.read(path, as_version=4)))


def _cells(notebook: Any) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
            continue
        yield f"```python\n{cell.source}\n```"
        for output in cell.outputs:
            yield shown(output.get("data", {"text/plain": output.get("text", "")}))
