"""Texts explained: by name from a folder, and a network of one's own with its tokenizer."""

import json

import numpy as np
import pytest
import torch

import undertow as ut
from tiny_transformers import bert, byte_level, gpt2, llama, saved, transformers, wordpiece
from undertow.attribution.text import write_texts

TEXT = "The food, was  not badly GOOD."


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return ut.load(f"hf:{saved(tmp_path_factory.mktemp('bert'), bert(), wordpiece())}")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return ut.load(f"hf:{saved(tmp_path_factory.mktemp('gpt2'), gpt2(), byte_level())}")


def test_the_map_is_that_of_explain_at_the_embeddings(classifier):
    explained = ut.explain_text(classifier, TEXT)
    ids = torch.tensor([[1, 4, 5, 0, 6, 7, 8, 9, 12, 11, 2]])
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    a = ut.explain(classifier.module, x, rule="attnlrp", at="bert.embeddings.word_embeddings")
    assert np.allclose(explained.tokens().values, a.values[0].sum(-1).double().numpy(), rtol=1e-5)
    assert explained.targets[0][0] == int(a.targets[0])
    logits = classifier.module(**x).logits[0].detach()
    assert [p.score for p in explained.predictions] == sorted(logits.tolist(), reverse=True)
    assert explained.attribution.names == {int(a.targets[0]): classifier.classes[int(a.targets[0])]}


def test_the_pieces_are_the_text_itself(classifier):
    explained = ut.explain_text(classifier, TEXT)
    assert explained.pieces[0] == "[CLS]"
    assert explained.pieces[-1] == "[SEP]"
    assert "".join(explained.pieces[1:-1]) == TEXT
    assert "  not" in explained.pieces


def test_the_pieces_of_bytes_are_the_text_itself(language):
    text = "the cat 猫 é on"  # 猫 is three tokens, none of which can be read alone
    explained = ut.explain_text(language, text)
    assert "".join(explained.pieces) == text
    assert len(explained.pieces) == len(explained.tokens().values) > len(text.split())


def test_the_next_token_of_a_language_model(language):
    explained = ut.explain_text(language, "the cat")
    ids = torch.tensor([language.tokenizer("the cat")["input_ids"]])
    scores = language.module(ids).logits[0, -1].detach()
    assert explained.targets[0][0] == int(scores.argmax())
    assert explained.predictions[0].name == language.piece(int(scores.argmax()))
    a = ut.explain(language.module, {"input_ids": ids}, rule="attnlrp", target=ut.targets.token(), at="transformer.wte")
    assert np.allclose(explained.tokens().values, a.values[0].sum(-1).double().numpy(), rtol=1e-4)


def test_a_token_is_named_with_or_without_its_space(language):
    cat, spaced = (language.tokenizer.convert_tokens_to_ids(piece) for piece in ("cat", "Ġcat"))
    scores = language.module(torch.tensor([language.tokenizer("the")["input_ids"]])).logits[0, -1].detach()
    likelier = max(cat, spaced, key=lambda i: scores[i])
    assert ut.explain_text(language, "the", target="cat").targets[0][0] == likelier
    assert ut.explain_text(language, "the", target=" cat").targets[0][:2] == (spaced, " cat")
    several = ut.explain_text(language, "the", target=["cat", 3])
    assert [i for i, _, _ in several.targets] == [likelier, 3]
    assert [t.title.split(",")[0] for t in several.all_tokens()][1] == f"attnlrp: {language.piece(3)} (3)"
    with pytest.raises(
        ut.TargetError, match=r"'dog' is no single token .* 'd' \(\d+\), 'o' \(\d+\), 'g' \(\d+\); name one"
    ):
        ut.explain_text(language, "the", target="dog")


@pytest.mark.parametrize("side", ["class", "next token"])
def test_what_is_cut_is_said(side, classifier, language):
    model = classifier if side == "class" else language
    text = "the cat was not good . " * 5
    with pytest.warns(ut.UndertowWarning, match=r"tokens and .* reads 1[26]: the (last|first) \d+ were left out"):
        explained = ut.explain_text(model, text)
    assert len(explained.pieces) == model.limit
    assert explained.left_out > 0
    assert "left out" in explained.notes[0]
    read = "".join(explained.pieces).replace("[CLS]", "").replace("[SEP]", "")
    assert text.startswith(read) if side == "class" else text.endswith(read)
    assert model.tokenizer.truncation_side == "right"


def test_positions_behind_the_paddings_are_counted():
    config = transformers.RobertaConfig(
        vocab_size=13, max_position_embeddings=12, pad_token_id=3, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, type_vocab_size=1,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    with pytest.warns(ut.UndertowWarning, match="reads 8"):
        assert len(ut.explain_text(model, "the cat was good " * 4, tokenizer=wordpiece()).pieces) == 8


def test_a_network_of_ones_own_with_its_tokenizer():
    explained = ut.explain_text(llama(), ["the cat", "cat on"], tokenizer=byte_level(), target="top:2")
    assert [e.text for e in explained] == ["the cat", "cat on"]
    assert explained[0].attribution.values.shape == (1, 2, 2, 16)
    assert len(explained[0].all_tokens()) == 2


def test_rules_and_estimators_go_with_it(classifier):
    plain = ut.explain_text(classifier, "the cat", rule="gradient", estimator="input-times")
    assert plain.attribution.estimator == "input-times"
    assert plain.attribution.rule == "gradient"
    with pytest.raises(ut.InputError, match=r"'bert.pooler' gives .* a place for each token"):
        ut.explain_text(classifier, "the cat", rule="gradient", at="bert.pooler")


def test_it_shows_itself_with_nothing_of_the_text_obeyed(classifier):
    explained = ut.explain_text(classifier, "<b>bad</b> \x1b[31mcat", target="positive")
    html = explained._repr_html_()
    assert "<b>" not in html
    assert "positive (1)" in html
    assert "\x1b[31m" not in explained.tokens().terminal()
    assert "predicts" in repr(explained)


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda m: ut.explain_text(m, "  "), ut.InputError, "the text is empty"),
        (lambda m: ut.explain_text(m, 3), ut.InputError, "a text is a str"),
        (lambda m: ut.explain_text(m, "cat", target="nice"), ut.TargetError, "no class 'nice' among 2"),
        (lambda m: ut.explain_text(m, "cat", target=2), ut.TargetError, "class 2 is out of range"),
        (lambda m: ut.explain_text(m.module, "cat"), ut.InputError, "NoneType is no tokenizer; pass tokenizer="),
        (lambda m: ut.explain_text(m.module.bert, "cat", tokenizer=m.tokenizer), ut.ModelError, "BertModel gives"),
        (lambda m: ut.explain_text(torch.nn.ReLU(), "cat"), ut.ModelError, "ReLU gives neither classes of a text nor"),
        (lambda m: ut.explain_text(m, "cat", rule="guided"), ut.RuleError, "no activation to rewire"),
        (lambda m: m.prepare("the cat " * 9), ut.InputError, "has 8 tokens more than the 12"),
    ],
)  # fmt: skip
def test_refusals(call, error, line, classifier):
    with pytest.raises(error, match=line) as caught:
        call(classifier)
    assert str(caught.value).isprintable()


def test_what_the_default_rule_cannot_walk_has_a_remedy():
    class Own(transformers.BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if torch.is_grad_enabled():
                output.logits = torch.utils.checkpoint.checkpoint(torch.tanh, output.logits, use_reentrant=True)
            return output

    model = bert()
    model.__class__ = Own
    with pytest.raises(ut.RuleError, match="cannot see into Checkpoint") as caught:
        ut.explain_text(model, "the cat", tokenizer=wordpiece())
    assert "input-times" in caught.value.__notes__[0]
    with pytest.raises(ut.RuleError) as plain:
        ut.explain_text(model, "the cat", tokenizer=wordpiece(), rule="attnlrp")
    assert not hasattr(plain.value, "__notes__")


def test_folders_of_texts(classifier, tmp_path):
    rules = ("attnlrp", "gradient")
    explained = [ut.explain_text(classifier, TEXT, rule=rule, target=["positive", "negative"]) for rule in rules]
    facts = write_texts(explained, classifier, tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted([*facts["files"], "text.json"])
    assert json.loads((tmp_path / "one" / "text.json").read_text()) == json.loads(json.dumps(facts))
    assert np.allclose(facts["rules"]["attnlrp"]["values"][1], explained[0].tokens(1).values)
    loaded = ut.Attribution.load(tmp_path / "one" / "gradient.safetensors")
    assert np.array_equal(loaded.values, explained[1].attribution.values.numpy())
    assert loaded.names == {0: "negative", 1: "positive"}
    page = ut.report(tmp_path / "one", explained[0], path=tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("attnlrp: positive (1)") == 2
    (tmp_path / "one" / "text.json").write_text('{"tokens": ["a"], "rules": {"x": {"titles": ["t"], "values": 3}}}')
    with pytest.raises(ut.InputError, match=r"text.json is not as undertow writes it"):
        ut.report(tmp_path, path=tmp_path / "page.html")
