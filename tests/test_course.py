"""The course: each page is a notebook with exercises, and answers that it checks. The site runs them: test_site.py."""

import re

import jupytext
import pytest

from documented import ROOT

LESSONS = sorted((ROOT / "docs" / "course").glob("[1-9]-*.md"))


def test_there_are_six_lessons_and_the_course_lists_them():
    assert re.findall(r"\((\d-[\w-]+\.md)\)", (LESSONS[0].parent / "index.md").read_text()) == [p.name for p in LESSONS]
    assert len(LESSONS) == 6


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_a_notebook_with_exercises_and_an_answer_to_each(lesson):
    text = lesson.read_text()
    cells = jupytext.read(lesson).cells
    assert sum(cell.cell_type == "code" for cell in cells) == text.count("```python\n") >= 5
    exercises, answers = text.split("## Exercises")[1].split("## Answers")
    numbers = re.findall(r"^(\d)\. ", exercises, re.M)
    assert len(numbers) >= 3
    assert re.findall(r"^\*\*(\d)\.\*\*", answers, re.M) == numbers
    assert answers.count("```python\n") >= len(numbers)
