"""The walls of the house: which file may import which, and where names that are not ours may stand."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
FRAMEWORKS = {"torch", "torchvision", "timm", "keras", "tensorflow", "jax", "flax", "equinox", "lightning"}
FACES = {f"undertow.{name}": {name} for name in ("lightning", "keras", "transformers")}
"""The files that stand in other libraries' training loops: each imports its library, and no other file imports them."""
CALLS = ("undertow.captum", "undertow.gradcam")
"""The folders with other libraries' calls, which take and return tensors of torch."""


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(name: str) -> set[str]:
    """Every module that a file imports, anywhere in it: of this package its own name, of others their root."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    modules = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])]
            )
            for alias in node.names:
                modules.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
    return modules - {name}


def test_no_files_import_each_other():
    try:
        TopologicalSorter({name: imported(name) & set(MODULES) for name in MODULES}).prepare()
    except CycleError as error:
        raise AssertionError(f"import circle: {' -> '.join(error.args[1])}") from None


def test_only_the_folders_of_frameworks_and_the_faces_import_frameworks():
    for name in MODULES:
        assert not imported(name) & set(FACES), name
        allowed = FACES.get(name) or set(re.findall(r"undertow\.frameworks\.(torch|keras|jax)", name))
        allowed |= {"torch"} if name.startswith(CALLS) else set()
        allowed |= {"torchvision", "timm"} if "torch" in allowed else {"tensorflow"} if "keras" in allowed else set()
        assert imported(name) & FRAMEWORKS <= allowed, name


def test_no_two_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not (name in FACES and node.name == "GradientRecorder"):
                places.setdefault(node.name, []).append(name)
    assert {cls: where for cls, where in places.items() if len(where) > 1} == {}


def test_private_names_of_torch_stand_in_one_file():
    private = re.compile(
        r"torch\._C\b|torch\.utils\._|\._(forward_hooks|backward_hooks|saved_\w+|is_view|version|base)\b"
    )
    for name, path in MODULES.items():
        if path.name != "internals.py":
            assert not private.search(path.read_text()), name


def test_the_map_in_the_design_names_every_file():
    design = (ROOT / "docs" / "design.md").read_text()
    for path in FILES:
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.name in design, f"{path.relative_to(ROOT)} is missing in the map of docs/design.md"


def test_the_public_names_are_those_that_type_checkers_see():
    import undertow

    seen = {
        alias.asname: alias.name
        for node in TREES["undertow"].body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == {name: name for name in undertow.__all__}
    assert all(hasattr(undertow, name) for name in seen)
    assert not hasattr(undertow, "nonsense")
