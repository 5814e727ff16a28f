"""References `hf:`: networks of transformers from folders, and every way in which one cannot be had."""

import json
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from tiny_transformers import LABELS, bert, byte_level, gpt2, saved, transformers, vit, wordpiece
from undertow.frameworks.torch import zoo
from undertow.frameworks.torch.zoo.hugging_face import preprocessing_of

pytestmark = pytest.mark.filterwarnings("ignore:nothing in .* says how pixels")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    saved(root / "vit", vit(), processor)
    saved(root / "bert", bert(), wordpiece())
    saved(root / "gpt2", gpt2(), byte_level())
    return root


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


def picture(width=340, height=225):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def test_an_image_classifier_comes_with_its_own_preprocessing_and_names(folders):
    classifier = ut.load(f"hf:{folders / 'vit'}")
    processor = transformers.AutoImageProcessor.from_pretrained(folders / "vit", backend="pil")
    theirs = processor(picture(), return_tensors="np")["pixel_values"]
    assert np.allclose(classifier.prepare(picture()).numpy(), theirs, atol=1e-6)
    assert classifier.classes == ("tench", "tabby, tabby cat", "tiger cat")
    assert classifier.id("tiger cat") == 2
    assert not classifier.module.training
    a = ut.explain(classifier, classifier.prepare(picture()), rule="attnlrp", target="tench")
    assert a.values.shape == (1, 3, 32, 32)
    own = vit()(classifier.prepare(picture())).logits[:, 0]
    assert torch.allclose(a.scores, own.detach())


PROCESSORS = {
    "ViT": {},
    "ConvNext": {"size": {"shortest_edge": 224}},
    "ConvNext squashed": {"size": {"shortest_edge": 384}},
    "CLIP": {},
    "Bit": {"size": {"shortest_edge": 256}},
    "DeiT": {},
    "Beit": {},
    "Siglip": {},
    "MobileViT": {"size": {"shortest_edge": 288}},
    "MobileNetV2": {},
    "EfficientNet": {},
    "PoolFormer": {},
    "Pvt": {"do_normalize": False},
    "Swin2SR": None,
}


@pytest.mark.parametrize("name", [name for name, settings in PROCESSORS.items() if settings is not None])
@pytest.mark.parametrize("size", [(340, 225), (211, 333), (100, 100), (231, 500)])
def test_processors_are_ours_to_the_pixel(name, size, tmp_path):
    made = getattr(transformers, f"{name.split()[0]}ImageProcessor")(**PROCESSORS[name])
    made.save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor(picture(*size), return_tensors="np")["pixel_values"][0]
    ours = preprocessing_of(processor.to_dict())
    assert np.allclose(ours.array(picture(*size)), theirs, rtol=0, atol=2e-6 / min(ours.std))
    assert ut.images.Preprocessing(**json.loads(json.dumps(ours.to_dict()))).array(picture(*size)).shape == theirs.shape


@pytest.mark.parametrize("made", [transformers.LevitImageProcessor(), transformers.PerceiverImageProcessor()])
def test_a_processor_that_does_something_else_is_refused(made, tmp_path):
    saved(tmp_path, vit(), made)
    with pytest.raises(ut.ModelError, match=f"{type(made).__name__}.* does to a photograph .* FILE.py:FUNCTION"):
        ut.load(f"hf:{tmp_path}")


def test_where_no_processor_is_the_scale_is_a_guess(tmp_path):
    saved(tmp_path, vit())
    with pytest.warns(UserWarning, match="nothing in .* says how pixels"):
        classifier = ut.load(f"hf:{tmp_path}")
    assert classifier.guessed
    assert classifier.prepare(picture()).shape == (1, 3, 32, 32)
    assert not ut.load(f"hf:{tmp_path}", preprocess="imagenet").guessed


def test_texts_have_their_tokenizer_and_names(folders):
    model = ut.load(f"hf:{folders / 'bert'}")
    assert isinstance(model, ut.TextModel)
    assert (model.classes, model.predicts, model.limit) == (tuple(LABELS.values()), "class", 12)
    assert model.embeddings == "bert.embeddings.word_embeddings"
    language = ut.load(f"hf:{folders / 'gpt2'}")
    assert (language.predicts, language.limit, len(language.classes)) == ("next token", 16, 265)
    assert "next token" in language._repr_html_()
    with pytest.raises(ut.ModelError, match="reads text, not photographs"):
        ut.images.Folder(ut.images.demo_photographs()["chelsea"].parent, language)[0]


def test_weights_are_random_by_name_and_from_a_file(folders, tmp_path):
    first, second = (ut.load(f"hf:{folders / 'bert'}@none") for _ in range(2))
    assert first.weights == "random (seed 0)"
    assert first.weights_sha256 == second.weights_sha256 != ut.load(f"hf:{folders / 'bert'}").weights_sha256
    from safetensors.torch import save_file

    save_file(bert().state_dict(), tmp_path / "own.safetensors")
    assert ut.load(f"hf:{folders / 'bert'}", weights=tmp_path / "own.safetensors").weights_sha256 == (
        ut.load(f"hf:{folders / 'bert'}").weights_sha256
    )


def test_a_head_without_weights_is_refused(tmp_path):
    model = bert()
    model.bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ut.ModelError, match="is a BertModel; what is read are classifiers"):
        ut.load(f"hf:{tmp_path}")
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ut.ModelError, match=r"no weights for classifier.bias, classifier.weight .* would be random"):
        ut.load(f"hf:{tmp_path}")


def test_code_of_a_model_is_never_run(tmp_path):
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    config = {"model_type": "own", "architectures": ["OwnForImageClassification"]}
    config |= {"auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ut.ModelError, match="code of its own, which is never run"):
        ut.load(f"hf:{tmp_path}")


def test_what_cannot_be_had_is_said_in_one_line(offline, tmp_path, folders):
    for reference, line in (
        ("hf:google/vit-base-patch16-224", r"could not download .*\(Name or service not known\).*give hf:FOLDER"),
        ("hf:gpt2@refs", "could not download hf:gpt2@refs"),
        ("hf:/no/such/folder", "there is no folder /no/such/folder"),
        (f"hf:{tmp_path}", "has no config.json"),
        ("hf:", "there is no folder"),
    ):
        with pytest.raises(ut.ModelError, match=line) as caught:
            ut.load(reference)
        assert str(caught.value).isprintable()
    (tmp_path / "config.json").write_text((folders / "bert" / "config.json").read_text())
    with pytest.raises(ut.ModelError, match="could not load the weights"):
        ut.load(f"hf:{tmp_path}")


def test_a_folder_whose_name_has_an_at(folders, tmp_path):
    saved(tmp_path / "a@b", bert(), wordpiece())
    assert ut.load(f"hf:{tmp_path / 'a@b'}").classes == tuple(LABELS.values())


def test_what_was_set_in_transformers_is_as_before(folders):
    log = transformers.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    ut.load(f"hf:{folders / 'bert'}")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_models_lists_what_is_downloaded(monkeypatch, tmp_path):
    (tmp_path / "models--google--vit-base-patch16-224").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (row,) = zoo.rows("hf", "google")
    assert (row.reference, row.offline) == ("hf:google/vit-base-patch16-224", True)
    assert [row.reference for row in zoo.rows("hf", None)] == ["hf:NAME_OR_FOLDER"]
