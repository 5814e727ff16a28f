"""`undertow explain`: photographs in, a folder of maps for each out."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .explained import print_explained
from .photographs import (
    ALL_RULES,
    RULES,
    WITHOUT_RELU,
    figure_option,
    for_each,
    ground_option,
    load_classifier,
    model_options,
    output_option,
    output_options,
    preprocess_option,
    weights_option,
)
from .printing import shown
from .report import report_option, write_with_network
from .sweeps import AT_ONCE, all_of, is_many, run_sweep, split_options, sweep_options
from .texts import all_texts, explain_texts, load_text_model, refuse_beside_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..attribution.photograph import ExplainedPhotograph
    from ..classifier import Classifier

EXAMPLES = """\b
Examples:
  undertow explain cat.jpg --model torchvision:resnet50
  undertow explain holiday/ --model demo --rule guided --target "tiger cat" --target 285
  undertow explain cat.jpg --model torchvision:vgg16 --weights vgg16.safetensors --target top:3 --json
  undertow explain scan.png --model nets.py:load --through swap
  undertow explain cat.jpg --model demo --estimator smoothgrad:10 --trust --report cat.html
  undertow explain cat.jpg --model keras:ResNet50
  undertow explain cat.jpg --model open_clip:ViT-B-32@openai --classes "a photo of a cat, a photo of a dog"
  undertow explain --text "The food was not bad at all." --model hf:FOLDER
  undertow explain --text "The capital of France is" --model hf:gpt2 --class Paris
  undertow explain cat.jpg --model timm:vit_base_patch16_224 --rule attnlrp --at patch_embed
  undertow explain scan.png --model saved/net.keras --preprocess 0..255
  undertow explain imagenet/val --model torchvision:resnet50 --rule guided --out maps --engine local
  undertow explain 'shards/train-{000..099}.tar' --model demo --out maps --pictures 10 --max-failures 100
  torchrun --nproc-per-node 2 -m undertow explain data.parquet:image --model demo --out maps --engine torchrun
"""


@click.command(short_help="Which pixels of a photograph spoke for a class.", epilog=EXAMPLES)
@click.argument("photographs", metavar="IMAGE...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--text", "texts", metavar="TEXT", multiple=True, help="In the place of IMAGE; may be repeated.")
@click.option(
    "--decoder-text",
    metavar="TEXT",
    help="What the decoder of a T5, BART, ... has written already; the token after it is explained.",
)
@click.option("--text-file", metavar="FILE", help="Texts in UTF-8, one a line; - reads them from standard input.")
@model_options
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(ALL_RULES),
    help="May be repeated. Default: the first three; without ReLUs gradient and attnlrp, of a text attnlrp.",
)
@click.option(
    "--target",
    "--class",
    "targets",
    metavar="CLASS",
    multiple=True,
    help="A number, a name, a token, or top:K; may be repeated. Default: what is predicted.",
)
@click.option(
    "--through",
    type=click.Choice(("graph", "swap", "hook")),
    default="graph",
    show_default=True,
    help="How the rule gets at the activations.",
)
@click.option(
    "--activations",
    type=click.Choice(("relu-like", "all")),
    default="relu-like",
    show_default=True,
    help="all: also GELU, SiLU, ELU and the like.",
)
@click.option(
    "--estimator",
    default="gradient",
    show_default=True,
    metavar="HOW",
    help="smoothgrad[:N], integrated[:N], input-times, grad-cam:LAYER, guided-grad-cam:LAYER; "
    "where a layer has its channels may be added, as in grad-cam:LAYER:bhwc.",
)
@click.option(
    "--head",
    type=click.Choice(("before", "as-is")),
    default="before",
    show_default=True,
    help="Of a network that ends in a softmax or sigmoid: the score before it, or what it returns.",
)
@click.option(
    "--baseline",
    "baselines",
    metavar="START",
    multiple=True,
    help="Where integrated begins: zero (default), blur, or a colour such as black, grey or #ff8800; several average.",
)
@click.option("--noise", default=0.1, show_default=True, help="Of smoothgrad, as a part of the input's range.")
@click.option("--inner-batch", default=8, show_default=True, help="Images in one pass of an estimator, at most.")
@click.option(
    "--at",
    metavar="LAYER",
    help="Explain by a layer's output, such as a transformer's patches, laid over the image; LAYER:bhwc says its axes.",
)
@click.option("--trust", "judge", is_flag=True, help="Ask of each map whether it deserves belief; takes longer.")
@weights_option(help="A .safetensors file, or a state dict saved by torch.save; for Keras a .weights.h5 file.")
@preprocess_option
@output_option
@report_option
@figure_option
@ground_option
@click.option("--pictures", metavar="all|none|N", help="Of a sweep: for how many images. Default: none.")
@sweep_options()
@output_options
def explain(
    photographs: Sequence[Path],
    texts: Sequence[str],
    text_file: str | None,
    decoder_text: str | None,
    reference: str,
    rules: Sequence[str],
    targets: Sequence[str],
    weights: Path | None,
    preprocess: str | None,
    device: str,
    out: Path,
    as_json: bool,
    judge: bool,
    output: str | None,
    classes: str | None,
    baselines: Sequence[str],
    page: Path | None,
    ground: str,
    ending: str,
    pictures: str | None,
    at: str | None,
    **options: Any,
) -> int:
    """Show which pixels of each IMAGE, or which words of each --text, spoke for a class or for the next word.

    IMAGE is a photograph, or a folder of them. Each gets a folder under --out: a panel, heatmaps and overlays as PNG,
    the raw values as safetensors, and result.json. A photograph that cannot be explained is named, the others are
    done all the same, and the exit code is 2.

    More than 12 photographs, a list (.txt), a column (FILE.parquet:COLUMN) or tar files are swept over instead: all
    maps go into a few large files, with an index; pictures on request. The same command goes on after an interruption,
    and `undertow status` says how far it is.
    """
    how, options = split_options(options)
    options["head"] = options["head"].replace("-", " ")
    if at is not None and judge:
        raise click.UsageError("--trust judges maps of pixels; leave --at out")
    if at is not None:
        layer, _, axes = at.partition(":")
        options |= {"at": layer} | ({"axes": axes} if axes else {})
    if texts or text_file:
        given = {
            "IMAGE": photographs,
            "--trust": judge,
            "--preprocess": preprocess,
            "--pictures": pictures,
            "--classes": classes,
        }
        given |= {"--figure": ending != "png", "--ground": ground != "white", "--baseline": baselines}
        given |= {f"--{name.replace('_', '-')}": value for name, value in how.items()}
        refuse_beside_text(given)
        options |= {"rules": tuple(dict.fromkeys(rules)), "target": targets, "decoder_text": decoder_text or ""}
        model = load_text_model(reference, weights, output)
        return explain_texts(model, all_texts(texts, text_file), options, device, out, as_json, page)
    if decoder_text:
        raise click.UsageError("--decoder-text: of a network that reads a --text; leave it out")
    if not photographs:
        raise click.UsageError("Missing argument 'IMAGE...', or --text.")
    from .. import images

    many = any(map(is_many, photographs))
    paths = [] if many else images.find(photographs)
    is_sweep = many or bool(how) or pictures is not None or (len(paths) > AT_ONCE and not judge and page is None)
    options["head"] = options["head"].replace("-", " ")
    classifier = load_classifier(reference, weights, preprocess, output, classes)
    options["baseline"] = [_baseline(classifier, word) for word in baselines] or "zero"
    options |= {"rules": tuple(dict.fromkeys(rules)) or RULES, "target": target_of(classifier, targets)}
    if is_sweep:
        load = partial(load_classifier, reference, weights, preprocess, output, classes)
        how |= {"device": device, "pictures": _pictures(pictures), "load": load, "judge": judge}
        given = {"--at": at, "--report": page, "--ground": ground != "white", "--figure": ending != "png"}
        if alone := ", ".join(name for name, value in given.items() if value):
            raise click.UsageError(
                f"{alone}: of photographs that are explained one by one, up to {AT_ONCE}; for a page of a sweep add "
                f"--pictures N, and then: undertow report {out}"
            )
        return _sweep(classifier, photographs, out, as_json, options, how)
    how = {"with_verdicts": judge, "page": page, "ground": ground, "ending": ending}
    return explain_all(classifier, paths, options, device, out, as_json, may_choose=not rules, **how)


def _sweep(
    classifier: "Classifier",
    photographs: Sequence[Path],
    out: Path,
    as_json: bool,
    options: dict[str, Any],
    how: dict[str, Any],
) -> int:
    """Sweep over many photographs; return the exit code."""
    from .. import sweep
    from ..errors import InputError

    if how.pop("judge"):
        raise InputError("--trust judges photographs one by one; for many: undertow trust ... --engine local")
    how |= {"rule": options.pop("rules"), "target": options.pop("target"), "options": options}
    return run_sweep(sweep.explain, classifier, all_of(photographs), out, as_json=as_json, **how)


def _pictures(word: str | None) -> int | None:
    """Return of how many images pictures are drawn; None: of all."""
    if word in (None, "none"):
        return 0
    if word == "all":
        return None
    if not word.isdecimal():
        raise click.BadParameter(f"{word!r} is not all, none or a number", param_hint="--pictures")
    return int(word)


def _baseline(classifier: "Classifier", word: str) -> Any:
    """Return what `undertow.explain` takes for a word: a colour becomes an image of it, as the network's input.

    Raises:
        InputError: it is no colour.
    """
    from PIL import Image

    from ..errors import InputError, printable

    if word in ("zero", "blur"):
        return word
    try:
        image = Image.new("RGB", (64, 64), word)
    except ValueError as error:
        raise InputError(
            f"unknown baseline '{printable(word)}'; it is zero, blur, or a colour such as black or #ff8800"
        ) from error
    array = classifier.preprocessing.array(image)
    return tuple(float(value) for value in array[:, array.shape[1] // 2, array.shape[2] // 2])


def target_of(classifier: "Classifier", words: Sequence[str]) -> Any:
    """Return the classes that the words name: "top:K", or a list of class ids.

    Raises:
        TargetError: a word names no class, or top:K stands beside others.
    """
    from ..classifier import find_class
    from ..errors import TargetError

    words = list(words) or ["top:1"]
    if any(word.startswith("top:") for word in words):
        if len(words) > 1:
            raise TargetError(f"top:K stands alone, not beside {len(words) - 1} other target(s); leave one out")
        return words[0]
    return list(dict.fromkeys(find_class(classifier, word) for word in words))


def explain_all(
    classifier: "Classifier",
    photographs: Sequence[Path],
    options: dict[str, Any],
    device: str,
    out: Path,
    as_json: bool = False,
    *,
    then: "Callable[[ExplainedPhotograph], object]" = lambda _: None,
    with_verdicts: bool = False,
    page: Path | None = None,
    ground: str = "white",
    ending: str = "png",
    may_choose: bool = False,
) -> int:
    """Explain and write every photograph, and print each result; return the exit code.

    Args:
        options: of `explain_photograph`.
        then: called with each photograph's maps.
        with_verdicts: also judge each map.
        page: where to write one HTML page of all of them.
        ground, ending: of the panels.
        may_choose: nobody named the rules: a network without ReLUs has others.
    """
    from rich.console import Console

    from ..attribution.photograph import explain_photograph, write
    from ..errors import RuleError
    from ..photographs import on_device

    device = on_device(classifier, device)
    done: dict[Path, Path] = {}
    positions = {path: f"{i} of {len(photographs)}" for i, path in enumerate(photographs, 1)}

    def work(path: Path, folder: Path) -> dict[str, Any]:
        with Console(stderr=True).status(shown(f"{path.name} ({positions[path]})")):
            try:
                explained = explain_photograph(classifier, path, **options, device=device)
            except RuleError as error:
                if not may_choose or "no activation to rewire" not in str(error):
                    raise
                explained = _without_relu(classifier, path, options, device, error)
            explained = _with_verdicts(explained, classifier, device) if with_verdicts else explained
            result = write(explained, classifier, folder, ground, ending)
        done[path] = folder
        then(explained)
        if not as_json:
            print_explained(explained, classifier, folder / f"panel.{ending}")
        return result

    code = for_each(photographs, out, work, verb="explained", as_json=as_json)
    if page and done:
        write_with_network(list(done.values()), page, classifier, next(iter(done)), device, quiet=as_json)
    return code


def _without_relu(
    classifier: "Classifier", path: Path, options: dict[str, Any], device: str, error: Exception
) -> "ExplainedPhotograph":
    """Explain a photograph where the usual rules find no activation, and let the next have these rules too.

    Raises:
        RuleError: these rules fail too; the first error is raised.
    """
    from dataclasses import replace

    from ..attribution.photograph import explain_photograph
    from ..errors import UndertowError

    try:
        explained = explain_photograph(classifier, path, **{**options, "rules": WITHOUT_RELU}, device=device)
    except UndertowError:
        raise error from None
    options["rules"] = WITHOUT_RELU
    note = f"no ReLU is on the way, so {' and '.join(WITHOUT_RELU)} explain; guided takes GELUs with --activations all"
    return replace(explained, notes=[note, *explained.notes])


def _with_verdicts(explained: "ExplainedPhotograph", classifier: "Classifier", device: str) -> "ExplainedPhotograph":
    """Add a verdict on each rule's map of the first target."""
    from dataclasses import replace

    from ..verdict.photograph import trust_photograph

    pairs = [(rule, attribution.estimator) for rule, attribution in explained.maps.items()]
    judged = trust_photograph(classifier, explained.path, pairs=pairs, target=explained.targets[0][0], device=device)
    verdicts = zip(explained.maps, judged.verdicts.values(), strict=True)
    return replace(explained, verdicts={rule: verdict.to_dict() for rule, verdict in verdicts})
