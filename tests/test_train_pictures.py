"""The pictures of a run: that they show the numbers, and as many of them as can be read."""

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont, get_font

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.pictures import MAX_NAMED, draw_confusion, fonts_for


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: the matrices, and the texts in their cells."""
    seen = {"imshow": [], "text": [], "rows": []}

    def spy(name, take):
        original = getattr(Axes, name)

        def draw(axes, *arguments, **options):
            seen[name].append(take(*arguments))
            return original(axes, *arguments, **options)

        monkeypatch.setattr(Axes, name, draw)

    spy("imshow", lambda matrix: matrix.tolist())
    spy("text", lambda x, y, text: (y, x, text))
    original = Axes.set_yticks
    monkeypatch.setattr(
        Axes,
        "set_yticks",
        lambda axes, ticks, labels: seen["rows"].append(labels) or original(axes, ticks, labels),
    )
    return seen


def test_rows_of_the_confusion_are_true_classes_and_sum_to_100(tmp_path, drawn):
    labels = torch.tensor([0, 0, 0, 1, 1])
    predictions = torch.tensor([0, 2, 2, 1, 1])
    picture = tmp_path / "confusion.png"
    draw_confusion(predictions, labels, ["cat", "dog", "no image"], picture, "title")
    (matrix,) = drawn["imshow"]
    assert matrix == [pytest.approx([100 / 3, 0, 200 / 3]), [0, 100, 0], [0, 0, 0]]
    assert sorted(drawn["text"]) == [(0, 0, "33.3"), (0, 2, "66.7"), (1, 1, "100")]
    assert drawn["rows"] == [["cat", "dog", "no image\n(no test images)"]]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_names_in_any_script_are_drawn_without_a_missing_glyph(tmp_path):
    # Of one that matplotlib's own fonts have, of one that no usual font has, of no formula.
    stix, plain = (
        get_font(findfont(name)).get_charmap() for name in ("STIXGeneral", "DejaVu Sans")
    )
    rare = chr(min(set(stix) - set(plain)))
    names = ["chat", "قطة", rare, "\U0010fffe", "a$b$"]
    with fonts_for(names) as fit:
        fitting = [fit(name) for name in names]
        draw_confusion(torch.arange(5), torch.arange(5), fitting, tmp_path / "c.png", "title")
    assert fitting == ["chat", "قطة", rare, "\\U0010fffe", r"a\$b\$"]


def test_many_classes_are_drawn_without_names_and_numbers(tmp_path, drawn):
    labels = torch.arange(MAX_NAMED + 1)
    classes = [f"class {label}" for label in labels]
    draw_confusion(labels, labels, classes, tmp_path / "confusion.png", "title")
    assert len(drawn["imshow"][0]) == MAX_NAMED + 1
    assert not drawn["text"]
