"""Tokens of real tokenizers, with the values of a language model's embeddings."""

import numpy as np
import pytest
import torch

import undertow as ut
from frameworks.torch.real_models import IDS, gpt2, transformers

tokenizers = pytest.importorskip("tokenizers")


def tokenizer_of(decoder=None, words=()):
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(50 - len(words)))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w49"))
    if decoder is not None:
        made.decoder = decoder
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def explained(**options):
    model = gpt2()["model"]
    target = ut.targets.token(7)
    return ut.explain(model, {"input_ids": IDS}, rule="attnlrp", target=target, at="transformer.wte", **options)


def test_each_token_has_the_sum_over_its_embedding():
    a = explained()
    shown = a.tokens(tokenizer_of(), sample=1)
    assert shown.tokens == [f"w{i}" for i in IDS[1].tolist()]
    assert np.allclose(shown.values, a.values[1].sum(-1).numpy(), rtol=1e-12)
    assert "score" in shown.title
    assert np.array_equal(a.token_ids, IDS.numpy())


def test_a_space_before_a_word_is_kept():
    words = [" ", "Ġthe"]
    made = tokenizer_of(tokenizers.decoders.ByteLevel(), words)
    a = ut.Attribution(np.ones((1, 2, 3)), None, np.ones(1), "attnlrp", token_ids=np.array([[1, 2]]))
    assert a.tokens(made).tokens[0] == " the"


def test_they_are_shaded_and_escaped():
    values = np.array([[[1.0, 1.0], [-4.0, 0.0]]])
    a = ut.Attribution(values, np.array([3]), np.array([2.0]), "attnlrp", token_ids=np.array([[0, 1]]))
    shown = a.tokens(tokenizer_of(words=["<b>", "\x1b[31m"]))
    html = shown._repr_html_()
    assert "<b>" not in html
    assert "rgba(213,94,0,0.42)" in html
    assert "rgba(0,114,178,0.85)" in html
    assert "\x1b[31m" not in shown.terminal()
    assert "-4" in repr(shown)


def test_they_survive_the_disk(tmp_path):
    a = explained()
    loaded = ut.Attribution.load(a.save(tmp_path / "a.safetensors"))
    assert np.array_equal(loaded.tokens(tokenizer_of()).values, a.tokens(tokenizer_of()).values)
    assert loaded.is_relevance
    assert np.allclose(loaded.conservation, a.conservation)


def test_what_lies_over_no_tokens_is_refused():
    a = ut.explain(torch.relu, torch.ones(1, 3), target=0)
    with pytest.raises(ut.InputError, match="no token ids were explained"):
        a.tokens(tokenizer_of())
    with pytest.raises(ut.InputError, match="no values lie over the token ids"):
        a.tokens(tokenizer_of(), ids=IDS)
    with pytest.raises(ut.InputError, match="no sample 2"):
        explained().tokens(tokenizer_of(), sample=2)
    with pytest.raises(ut.InputError, match="no decode"):
        explained().tokens(object())
