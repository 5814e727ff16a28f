"""`undertow derive` as a person meets it, and the page of exercises, whose answers the tool writes.

`python tests/derive/test_cli.py` writes docs/derive.md anew.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from undertow.cli import main
from undertow.cli.derive import derive

PAGE = Path(__file__).parents[2] / "docs" / "derive.md"
ANSWER = re.compile(r"(?<=```sh\n)(undertow derive [^`]*?)\n```\n```text\n(.*?)(?=```)", re.S)
EXERCISE = "x1>n1 x2>n2 n1>n3 n1>n4 n2>n4 n2>n5 n3>n6 n4>n6 n4>n7 n5>n7"


def call(capfd, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["derive", *map(str, words)])
    printed = capfd.readouterr()
    return left.value.code, printed.out, printed.err


def test_every_answer_on_the_page_is_the_tools(capfd):
    answers = ANSWER.findall(PAGE.read_text())
    assert len(answers) >= 12
    for line, answer in answers:
        code, out, err = call(capfd, *shlex.split(line)[2:])
        assert (code, out, err) == (0, answer, ""), line


def test_the_numbers_on_the_page_are_the_librarys():
    from undertow.derive import Network

    page = PAGE.read_text()
    rows = re.findall(r"^\| ([\d, ]+) \| ([\d,]+) \| ([\d,]+) × ([\d,]+) \+ \| ([\d,]+) × ([\d,]+) \+ \|$", page, re.M)
    assert len(rows) >= 3
    for widths, *expected in rows:
        count = Network.layered([int(width) for width in widths.split(", ")]).derivative("b[1]").operations
        assert [int(number.replace(",", "")) for number in expected] == [count.paths, *count.factored, *count.expanded]


def test_several_names_json_and_pictures(capfd, tmp_path):
    words = ("chain", EXERCISE, "--wrt", "n4", "--wrt", "x2[d]", "--json", "--expand", "--plot", tmp_path / "way.png")
    code, out, err = call(capfd, *words)
    assert (code, err) == (0, "")
    first, second = json.loads(out)
    assert (first["wrt"], second["wrt"]) == ("n4", "x2[d]")
    assert second["paths"] == 3
    assert second["factored"] == {"multiplications": 6, "additions": 2}
    assert second["expanded"] == {"multiplications": 9, "additions": 2}
    assert second["expanded_text"].count("∂E/∂n7") == 2
    assert second["difference"] < 1e-12
    for name in ("way-1.png", "way-2.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600


def test_directional_json(capfd):
    code, out, _ = call(capfd, "directional", "norm(X)", "--wrt", "X", "--shape", "X=1,d", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["text"] == "D(‖X‖₂)[H] = XHᵀ/‖X‖₂"
    assert (answer["direction_shape"], answer["result_shape"]) == ([1, "d"], [1, 1])
    assert answer["remarks"] == ["‖X‖₂ is not differentiable where X = 0"]
    assert answer["differences"]["jvp"] < 1e-12
    assert answer["differences"]["central_difference"] < 1e-6


def test_a_model_from_a_file(capfd, tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.bend = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1)\n"
        "        self.head = torch.nn.Linear(3, 4)\n"
        "    def forward(self, x):\n"
        "        h = self.conv(x)\n"
        "        return self.head((h + self.bend(h)).mean((2, 3)))\n"
        "load = Net\n"
    )
    words = ("model", "--model", f"{path}:load", "--shape", "2,3,8,8", "--wrt", "conv", "--target", "2")
    code, out, err = call(capfd, *words, "--plot", tmp_path / "blocks.svg", "--ground", "dark")
    assert (code, err) == (0, "")
    assert "∂E/∂conv = δ(add) · ∂add/∂bend · ∂bend/∂conv + δ(add) · ∂add/∂conv" in out
    assert "what the edges carry adds up to" in out
    assert "#181818" in (tmp_path / "blocks.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chain", "x1>n1 n1>n2 n2>n1", "--wrt", "n1"), "cycle, n1 > n2 > n1, closed by n2>n1 at column 13"),
        (("chain", EXERCISE, "--wrt", "w[2,6]"), "no edge n2>n6"),
        (("chain", EXERCISE, "--wrt", "n4", "--plot", "way.jpg"), "must end in .png, .svg or .pdf"),
        (("directional", "X*b", "--wrt", "X", "--shape", "X=d,d", "--shape", "b=k"), "column 3: 'b' is k×1"),
        (("directional", "X", "--wrt", "X", "--shape", "X"), "write NAME=ROWS,COLUMNS"),
        (("directional", "X", "--wrt", "Y", "--shape", "X=d,d"), "'Y', the variable to differentiate by, has no shape"),
        (("model", "--model", "torchvision:alexnet@none", "--wrt", "feature"), "did you mean features"),
    ],
)
def test_wrong_words_get_one_line_and_exit_code_2(capfd, words, message):
    code, out, err = call(capfd, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_answer_that_numbers_contradict_has_exit_code_2(capfd, monkeypatch):
    from undertow.derive import Derivative, Directional

    monkeypatch.setattr(Derivative, "check", lambda self, seed: 0.25)
    code, out, _ = call(capfd, "chain", EXERCISE, "--wrt", "n4")
    assert code == 2
    assert "within 2.5e-01 of autograd" in out
    monkeypatch.setattr(Directional, "check", lambda self, seed: 0.25)
    code, out, _ = call(capfd, "directional", "X", "--wrt", "X", "--shape", "X=d,d")
    assert code == 2
    assert "within 2.5e-01 of torch.func.jvp" in out


def test_every_subcommand_has_help_with_examples(capfd):
    for name in derive.commands:
        code, out, _ = call(capfd, name, "--help")
        assert code == 0
        lines = re.findall(r"^ *(undertow derive .*)$", out.partition("Examples:")[2], re.M)
        assert lines
        for line in lines:
            words = shlex.split(line)[2:]
            assert derive.commands[words[0]].make_context(words[0], words[1:])


def regenerated() -> str:
    """Return the page with every answer as the tool gives it now."""

    def answer(match: re.Match[str]) -> str:
        words = [sys.executable, "-m", *shlex.split(match[1])]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return f"{match[1]}\n```\n```text\n{output}"

    return ANSWER.sub(answer, PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(regenerated())
