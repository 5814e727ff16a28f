"""What each extra alone must do: command lines that a user would type, in a folder with the files that they speak of.

A line that lacks another extra has to say so, with a remedy that pip takes as it is typed: `NEEDED` lists those.
"""

from pathlib import Path

PYTHON = "python -I -W error -c "
EXPLAIN = "undertow explain cat.jpg --rule guided --out maps --model "
TRUST = "undertow trust cat.jpg --model "
MAP = "cat/cat/guided.safetensors"

TRIES = {
    "": (
        PYTHON + "'import undertow as ut, sys; assert ut.load and ut.rules.RULES and not \"torch\" in sys.modules'",
        PYTHON + f'\'import undertow as ut; ut.Attribution.load("{MAP}").image(0).save("map.png")\'',
        "undertow --version",
        "undertow explain --help",
    ),
    "record": (
        "undertow quantiles runs/max",
        "undertow diagnose runs/max",
        "undertow compare runs/max runs/average",
        "undertow check runs/max",
        "undertow export runs/max --to csv --out tables",
        "undertow export runs/max --to npz --out arrays",
    ),
    "plot": ("undertow quantiles runs/max --plot quantiles.svg",),
    "report": ("undertow report cat -o cat.html", "undertow report runs/max cat -o both.html"),
    "derive": (
        "undertow derive directional 'X*C*X' --wrt X --shape X=d,d --shape C=d,d",
        "undertow derive chain 'x1>n1 n1>n2 n1>n3' --wrt n1 --expand",
    ),
    "torch": (
        EXPLAIN + "nets.py:load --weights mine.safetensors --preprocess 0..1@96",
        TRUST + "nets.py:load --preprocess 0..1@64",
        "undertow trace --model nets.py:load --preprocess 0..1@64",
        "undertow record photographs --model nets.py:load --preprocess 0..1@64 --sites conv --out recorded",
    ),
    "vision": (
        EXPLAIN + "torchvision:squeezenet1_1@none",
        EXPLAIN + "timm:resnet18@none",
        "undertow models resnet18",
    ),
    "demo": ("undertow demo --out demonstration",),
    "keras": (
        EXPLAIN + "small.keras --preprocess 0..1",
        TRUST + "small.keras --preprocess 0..1",
    ),
    "jax": (EXPLAIN + "jax:jaxnet.py:build", TRUST + "jax:jaxnet.py:build"),
    "text": (
        "undertow explain --text 'The food was not bad at all .' --model hf:reviews --class positive --out texts",
    ),
    "clip": (
        "undertow explain cat.jpg --model open_clip:ViT-S-32-alt@none --classes 'a cat' --rule attnlrp --out maps",
    ),
    "ray": ("undertow explain photographs --model nets.py:load --preprocess 0..1@64 --engine ray --out swept",),
}
"""Of each extra what it is for; of the base what needs none."""

NEEDED = {
    "plot": {"record"},
    "report": {"record"},
    "derive": {"torch"},
    "torch": {"record"},
    "ray": {"record", "torch"},
}
"""Further extras that a line asks for: to read runs, to check with numbers, and something to explain with."""

JAXNET = """
import jax

def build():
    w = jax.random.normal(jax.random.key(0), (48, 3)) / 48
    return {
        "module": lambda x: jax.nn.relu(x.reshape(len(x), -1)[:, :48] @ w),
        "preprocessing": {"resize": 32, "crop": 32},
        "classes": ["a", "b", "c"],
    }
"""


def furnish(folder: Path) -> None:
    """Write photographs, networks, runs and maps: what the documentation's lines run on."""
    import os
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import documented
    from undertow.frameworks.torch.zoo.importing import import_torchvision

    import_torchvision()  # as it is on a CPU, for transformers
    documented.furnish(folder)
    documented.furnish_keras(folder)
    (folder / "jaxnet.py").write_text(JAXNET)
    _, block = next(documented.blocks_of(documented.ROOT / "docs" / "text.md", "python"))
    os.chdir(folder)
    exec(block, {})
    documented.run_line("undertow explain cat.jpg --model small.py:load --rule guided --out cat", stand_ins=False)
