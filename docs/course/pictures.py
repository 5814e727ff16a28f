"""Draw what the sixth notebook talks of: maps of three classes under three rules, beside the photograph.

python docs/course/pictures.py
"""

from pathlib import Path

import undertow as ut
from undertow.show.plots import as_image, new_figure

CLASSES = ("Egyptian cat", "tabby", "espresso")
COLOURS = 128  # of the picture's palette, which keeps it small
RULES = ("gradient", "deconvnet", "guided")


def main() -> None:
    demo = ut.load("demo")
    photograph = ut.images.read(ut.images.demo_photographs()["chelsea"])
    x = demo.prepare(photograph)
    figure = new_figure(figsize=(8.4, 6.6), layout="constrained")
    axes = figure.subplots(len(RULES), len(CLASSES) + 1)
    for row, rule in zip(axes, RULES, strict=True):
        a = ut.explain(demo, x, rule=rule, target=[[demo.id(name) for name in CLASSES]])
        row[0].imshow(demo.preprocessing.view(photograph))
        row[0].set_ylabel(rule, fontsize=12)
        for k, name in enumerate(CLASSES):
            row[k + 1].imshow(ut.show.draw(a.values[0, k], "signed"))
            likeness = "" if k == 0 else f"\ncorrelation {a.likeness()[0, 0, k]:.2f}"
            row[k + 1].set_title(name + likeness, fontsize=10)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
    picture = as_image(figure).convert("RGB").quantize(COLOURS)
    picture.save(Path(__file__).with_name("class.png"), optimize=True)


if __name__ == "__main__":
    main()
