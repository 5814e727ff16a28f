"""Files that appear whole or not at all, and names that stay where they belong."""

import pytest

from undertow.files import distinct, published, readable

NAMES = ["a/x.jpg", "b/x.jpg", "A/X.JPG", "a/x.jpg ", "../../x", "..", "", "x" * 300, "é" * 200, "猫 一.png", "a\nb"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with published(path) as aside:
        aside.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), published(path) as aside:
        aside.write_text(str(1 / 0))
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_names_are_distinct_even_without_case_and_cannot_leave_the_folder(tmp_path):
    given = distinct(NAMES)
    assert len({name.casefold() for name in given}) == len(NAMES)
    for name in given:
        assert "/" not in name
        assert "\n" not in name
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(NAMES)


def test_readable_keeps_other_scripts_and_cuts_between_characters():
    assert readable("猫 一.png") == "猫_一.png"
    assert readable("é" * 200, 81) == "é" * 40
    assert readable("../..") == "unnamed"
