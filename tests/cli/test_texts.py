"""`undertow explain --text` as a person meets it."""

import json

import pytest

from tiny_transformers import bert, byte_level, gpt2, saved, transformers, vit, wordpiece
from undertow.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    saved(root / "bert", bert(), wordpiece())
    saved(root / "gpt2", gpt2(), byte_level())
    saved(root / "vit", vit(), transformers.ViTImageProcessor(size={"height": 32, "width": 32}))
    saved(root / "wordless", bert())
    saved(root / "mixed", bert(), byte_level())
    return {name: f"hf:{root / name}" for name in ("bert", "gpt2", "vit", "wordless", "mixed")}


def call(capfd, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capfd.readouterr()
    return left.value.code, printed.out, printed.err


def test_texts_are_shaded_and_written(models, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    words = ["--text", "The food was not bad.", "--model", models["bert"], "--out", tmp_path]
    code, out, err = call(capfd, "explain", *words, "--class", "positive", "--rule", "attnlrp", "--rule", "gradient",
                          "--report", tmp_path / "page.html")  # fmt: skip
    assert (code, err) == (0, "")
    assert "48;2;213;94;0" not in out  # the strongest is at 0.85 of its colour
    assert "\x1b[30;48;2;" in out
    assert "attnlrp: positive (1), score" in out
    assert "negative" in out
    folder = tmp_path / "text-1-The_food_was_not_bad"
    facts = json.loads((folder / "text.json").read_text())
    assert facts["tokens"] == ["[CLS]", "The", " food", " was", " not", " bad", ".", "[SEP]"]
    assert set(facts["rules"]) == {"attnlrp", "gradient"}
    assert "positive (1)" in (folder / "tokens.html").read_text()
    assert "gradient: positive (1)" in (tmp_path / "page.html").read_text()


def test_without_colours_the_strongest_are_named(models, tmp_path, capfd):
    code, out, _ = call(capfd, "explain", "--text", "the cat", "--model", models["gpt2"], "--out", tmp_path)
    assert code == 0
    assert "\x1b" not in out
    assert "\nthe cat\n" in out
    assert "strongest: '" in out


def test_a_file_of_texts_goes_on_after_one_that_fails(models, tmp_path, capfd):
    (tmp_path / "texts.txt").write_text("the cat\n\n" + "\x07\n" + "not good\n", encoding="utf-8")
    words = ["--text-file", tmp_path / "texts.txt", "--model", models["bert"], "--out", tmp_path / "out", "--json"]
    code, out, _ = call(capfd, "explain", *words)
    summary = json.loads(out)
    assert [r["text"] for r in summary["results"]] + [f["text"] for f in summary["failed"]] != []
    assert code == (2 if summary["failed"] else 0)
    assert summary["results"][0]["predicts"] == "class"
    assert all((tmp_path / "out").joinpath(r["folder"].rpartition("/")[2]).is_dir() for r in summary["results"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--text", " ", "--model", "bert"], "the text is empty"),
        (["--text", "cat", "--model", "vit"], "reads photographs, not text"),
        (["cat.png", "--model", "bert"], "reads text, not photographs"),
        (["--text", "cat", "--model", "wordless"], "has no tokenizer (tokenizer.json, vocab.txt)"),
        (["--text", "cat", "--model", "mixed"], "and the network embeds 13: it is another network's"),
        (["--text", "cat", "--model", "gpt2", "--class", ""], "an empty word is no token"),
        (["--text", "cat", "--model", "gpt2", "--class", "猫"], "name one of them, or its number"),
        (["--text", "cat", "--model", "bert", "--estimator", "grad-cam:classifier"], "grad-cam lays a map over photo"),
        (["--text", "cat", "--model", "bert", "--class", "fine"], "no class 'fine' among 2"),
        (["--text", "cat", "--model", "gpt2", "--class", "dog"], "'dog' is no single token"),
        (["--text", "cat", "--model", "bert", "--rule", "guided"], "no activation to rewire"),
        (["--text", "cat", "--model", "bert", "--trust"], "--trust: of photographs"),
        (["cat.png", "--text", "cat", "--model", "bert"], "IMAGE: of photographs"),
        (["--text", "cat", "--model", "bert", "--limit", "3"], "--limit: of photographs"),
        (["--model", "bert"], "Missing argument 'IMAGE...', or --text"),
        (["--text-file", "nothere.txt", "--model", "bert"], "nothere.txt cannot be read"),
        (["--text-file", "/dev/null", "--model", "bert"], "holds no text"),
    ],
)
def test_refusals_are_one_line(words, line, models, tmp_path, capfd):
    words = [models.get(word, word) for word in words]
    code, _, err = call(capfd, "explain", *words, "--out", tmp_path)
    assert code == 2
    assert line in err
    assert "Traceback" not in err


def test_commands_that_read_photographs_say_so(models, capfd):
    for words in (["sites"], ["trace"], ["trust", "cat.png"], ["derive", "model", "--wrt", "x"]):
        code, _, err = call(capfd, *words, "--model", models["bert"])
        assert code == 2
        assert "reads text" in err
    folder = models["bert"].removeprefix("hf:")
    for reference, hint in (
        (folder, "a folder that save_pretrained wrote is hf:"),
        (f"hf:{folder}/config.json", "is a file"),
        (f"{folder}/model.safetensors", "weights alone go with a network: --model"),
    ):
        code, _, err = call(capfd, "explain", "--text", "cat", "--model", reference)
        assert code == 2
        assert hint in err


def test_classes_that_exclude_each_other_have_probabilities_whatever_their_scores(models, tmp_path, capfd):
    for text in ("the food was bad", "the cat was not good"):
        code, out, _ = call(capfd, "explain", "--text", text, "--model", models["bert"], "--out", tmp_path, "--json")
        assert code == 0
        found = json.loads(out)["results"][0]["predictions"]
        assert sum(row["probability"] for row in found) == pytest.approx(1, abs=1e-5)


def test_what_is_cut_is_noted(models, tmp_path, capfd):
    code, out, err = call(capfd, "explain", "--text", "the cat " * 20, "--model", models["bert"], "--out", tmp_path)
    assert code == 0
    assert "note: the text has 42 tokens" in out
    assert err == ""


def test_photographs_by_attention_and_at_patches(models, tmp_path, capfd):
    from undertow import Attribution
    from undertow.images import demo_photographs

    words = ["explain", demo_photographs()["chelsea"], "--model", models["vit"], "--device", "cpu"]
    code, out, err = call(capfd, *words, "--rule", "attention-rollout", "--rule", "attnlrp", "--class", "tiger cat",
                          "--out", tmp_path / "a", "--report", tmp_path / "a.html")  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 attention layers read" in out
    assert Attribution.load(tmp_path / "a" / "chelsea" / "attention-rollout.safetensors").map(0, 0).shape == (1, 32, 32)
    code, out, err = call(capfd, *words, "--rule", "attnlrp", "--at", "vit.embeddings", "--out", tmp_path / "b",
                          "--report", tmp_path / "b.html")  # fmt: skip
    assert (code, err) == (0, "")
    a = Attribution.load(tmp_path / "b" / "chelsea" / "attnlrp.safetensors")
    assert a.values.shape == (1, 1, 17, 16)
    assert a.map(0, 0).shape == (1, 32, 32)
    assert (tmp_path / "b" / "chelsea" / "attnlrp-overlay.png").is_file()
    for more, line in (
        (["--at", "vit.embedding"], "did you mean vit.embeddings"),
        (["--at", "classifier"], "a map over the input needs a layer"),
        (["--at", "vit.embeddings", "--trust"], "--trust judges maps of pixels"),
        (["--at", "vit.embeddings", "--limit", "1"], "--at: of photographs"),
    ):
        code, _, err = call(capfd, *words, "--rule", "gradient", *more, "--out", tmp_path / "c")
        assert code == 2
        assert line in err


def test_where_no_rule_is_named_a_network_without_relus_is_explained_all_the_same(models, tmp_path, capfd):
    from undertow.images import demo_photographs

    paths = [demo_photographs()["chelsea"]]
    words = ["explain", *paths, "--model", models["vit"], "--device", "cpu", "--out", tmp_path]
    code, out, err = call(capfd, *words)
    assert (code, err) == (0, "")
    assert "no ReLU is on the way, so gradient and attnlrp explain" in " ".join(out.split())
    assert set(json.loads((tmp_path / "chelsea" / "result.json").read_text())["rules"]) == {"gradient", "attnlrp"}
    code, _, err = call(capfd, *words, "--rule", "guided")
    assert code == 2
    assert "found no activation to rewire" in err


def test_a_sweep_by_attention(models, tmp_path, capfd):
    from undertow import Sweep
    from undertow.images import demo_photographs

    words = ["explain", demo_photographs()["chelsea"], "--model", models["vit"], "--rule", "attention-rollout"]
    code, _, _ = call(capfd, *words, "--out", tmp_path / "sweep", "--engine", "local", "--device", "cpu")
    assert code == 0
    assert Sweep(tmp_path / "sweep").map(0).shape[-2:] == (32, 32)
