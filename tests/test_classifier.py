"""What one does with a classifier from Python: prepare photographs, name classes, explain."""

import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from undertow.images import demo_photographs, read

CHELSEA, COFFEE = (demo_photographs()[name] for name in ("chelsea", "coffee"))


@pytest.fixture(scope="module")
def classifier():
    return ut.load("torchvision:squeezenet1_1@none")


def test_a_photograph_is_explained_in_two_lines(classifier):
    a = ut.explain(classifier.module, classifier.prepare(CHELSEA), target=classifier.id("tiger cat"))
    assert a.values.shape == (1, 3, 224, 224)
    assert a.targets.tolist() == [282]


def test_classes_by_name_and_number(classifier):
    assert (classifier.names[282], classifier.id("tiger cat"), classifier.id(281)) == ("tiger cat", 282, 281)
    with pytest.raises(ut.TargetError, match=r"no class 'tigre cat'.*did you mean"):
        classifier.id("tigre cat")


def test_prepared_photographs_are_those_of_the_preprocessing(classifier):
    expected = np.stack([classifier.preprocessing.array(read(path)) for path in (CHELSEA, COFFEE)])
    for given in ([CHELSEA, COFFEE], (str(CHELSEA), read(COFFEE)), [Image.open(CHELSEA), Image.open(COFFEE)]):
        batch = classifier.prepare(given)
        assert isinstance(batch, torch.Tensor)
        assert np.array_equal(batch.numpy(), expected)
    assert np.array_equal(classifier.prepare(CHELSEA).numpy(), expected[:1])


def test_an_opened_photograph_is_turned_as_its_file_is(classifier, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    read(CHELSEA).save(tmp_path / "turned.png", exif=exif)
    from_file = classifier.prepare(tmp_path / "turned.png")
    assert torch.equal(classifier.prepare(Image.open(tmp_path / "turned.png")), from_file)
    assert torch.equal(classifier.prepare(read(tmp_path / "turned.png")), from_file)
    assert not torch.equal(classifier.prepare(CHELSEA), from_file)


def test_photographs_that_cannot_be_prepared_are_named(classifier, tmp_path):
    whole = CHELSEA.read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ut.PhotographError, match=r"broken\.jpg cannot be read"):
        classifier.prepare([CHELSEA, tmp_path / "broken.jpg"])
    with (
        Image.open(tmp_path / "broken.jpg") as opened,
        pytest.raises(ut.PhotographError, match="the Pillow image cannot be read"),
    ):
        classifier.prepare(opened)
    with pytest.raises(ut.PhotographError, match="no photograph was given"):
        classifier.prepare([])
