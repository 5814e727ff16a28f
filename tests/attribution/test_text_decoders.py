"""Encoder-decoders: the token that the decoder writes next, by the tokens that the encoder reads."""

import json

import numpy as np
import pytest
import torch

import undertow as ut
from frameworks.torch.relevance_twins import relevance
from tiny_transformers import bart, saved, seeded, t5, transformers, wordpiece
from undertow.cli import main

TEXT = "the food was not bad"
IDS = [1, 4, 5, 6, 7, 8, 2]
STARTS = {"t5": [3], "bart": [2]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    for name, make in (("t5", t5), ("bart", bart)):
        saved(root / name, make(), wordpiece())
    return {name: ut.load(f"hf:{root / name}") for name in STARTS}


@pytest.fixture(params=list(STARTS))
def model(request, models):
    return models[request.param]


def inputs(model, decoder):
    """What the network reads, as embeddings, in float64."""
    module = model.module.double()
    embeds = module.get_encoder().get_input_embeddings()(torch.tensor([IDS])).detach()
    mask = torch.ones(1, len(IDS), dtype=torch.long)
    return module, {"inputs_embeds": embeds, "attention_mask": mask, "decoder_input_ids": torch.tensor([decoder])}


def name_of(model):
    return "t5" if "T5" in type(model.module).__name__ else "bart"


@pytest.mark.parametrize("decoder_text", ["", "the cat"])
@pytest.mark.parametrize("rule", ["attnlrp", "gradient"])
def test_relevance_is_that_of_a_twin_from_the_encoders_embeddings(rule, decoder_text, model):
    decoder = STARTS[name_of(model)] + ([4, 10] if decoder_text else [])
    module, x = inputs(model, decoder)
    explained = ut.explain_text(model, TEXT, rule=rule, target="good", decoder_text=decoder_text)
    if rule == "attnlrp":
        wanted = relevance(module, x, lambda output: output.logits[:, -1, 12], rule)
    else:
        leaf = x["inputs_embeds"].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(module(**{**x, "inputs_embeds": leaf}).logits[0, -1, 12], leaf)
    values = torch.as_tensor(explained.attribution.values)[0, 0]
    assert float((values - wanted[0]).norm() / wanted.norm()) < 1e-10
    assert explained.pieces == ("[CLS]", "the", " food", " was", " not", " bad", "[SEP]")
    assert explained.targets[0][0] == 12
    scores = module(**x).logits[0, -1].detach()
    assert np.allclose([p.score for p in explained.predictions], scores.sort(descending=True).values[:5])


def test_the_token_that_it_is_made_to_write_first_is_in_the_start(tmp_path):
    file = saved(tmp_path, bart(), wordpiece()) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"forced_bos_token_id": 1}))
    assert ut.load(f"hf:{tmp_path}").decoder_start == (2, 1)


def test_what_is_too_long_loses_its_end(models):
    with pytest.warns(ut.UndertowWarning, match=r"reads 12: the last \d+ were left out"):
        explained = ut.explain_text(models["bart"], "the cat was not good . " * 5)
    assert explained.pieces[0] == "[CLS]"


def test_refusals_name_the_remedy(models, tmp_path):
    from tiny_transformers import gpt2

    with pytest.raises(ut.InputError, match="has no decoder beside its encoder; leave --decoder-text"):
        ut.explain_text(gpt2(), "the cat", tokenizer=wordpiece(), decoder_text="the")
    network = seeded(transformers.BartForSequenceClassification, bart().config)
    with pytest.raises(ut.ModelError, match="reads its text in its encoder and in its decoder"):
        ut.explain_text(network, "the cat", tokenizer=wordpiece())
    network = t5()
    network.config.decoder_start_token_id = network.generation_config.decoder_start_token_id = None
    with pytest.raises(ut.ModelError, match="nothing says with which token the decoder of a T5For"):
        ut.explain_text(network, "the cat", tokenizer=wordpiece())


def test_on_the_command_line(models, tmp_path, capsys):
    words = ["explain", "--text", TEXT, "--model", models["t5"].reference, "--decoder-text", "the", "--class", "good"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--out", str(tmp_path / "out")])
    assert left.value.code == 0
    assert "attnlrp: good (12), score" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["explain", "cat.png", "--model", "demo", "--decoder-text", "the"])
    assert left.value.code == 2
    assert "--decoder-text: of a network that reads a --text" in capsys.readouterr().err
