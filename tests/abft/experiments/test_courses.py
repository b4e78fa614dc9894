"""Training courses over one another: means and bands of known histories, and which curve stands where."""

import numpy as np
import pytest

from abft.experiments.courses import PANELS, course, course_figure
from abft.experiments.methods import METHODS
from abft.experiments.styles import generated_style, style_of


def history(losses, heads=None, start=1):
    entries = [{"step": start + i, "loss": loss} for i, loss in enumerate(losses)]
    for entry, count in zip(entries, heads or [], strict=False):
        entry |= {"induction_heads": count, "wrong_penalty": 0.5, "mass_correct": 0.2, "mass_wrong": 0.1}
    return [*entries, {"step": start + len(losses) - 1, "train_runtime": 3.0}]


def test_mean_and_error_over_seeds():
    steps, means, errors = course([history([4, 2], [1, 3]), history([2, 2], [3, 5])], "induction_heads")
    assert steps == [1, 2]
    assert means.tolist() == [2, 4]
    assert errors.tolist() == [1, 1]  # of 1, 3: standard deviation √2 over √2


def test_losses_are_relative_to_the_first_step():
    steps, means, errors = course([history([4, 2, 1]), history([200, 150, 50])], "loss")
    assert steps == [1, 2, 3]
    assert means.tolist() == [1, 0.625, 0.25]
    assert errors[0] == 0
    assert errors[1] == pytest.approx(np.std([0.5, 0.75], ddof=1) / np.sqrt(2))


def test_only_steps_that_all_runs_have():
    resumed = history([9, 9], [4, 4], start=2)
    assert course([history([1, 1, 1], [2, 4, 6]), resumed], "induction_heads")[0] == [2, 3]
    assert course([history([1], [1]), history([1])], "induction_heads")[0] == []
    assert course([history([0.0, 1.0])], "loss")[0] == []  # no ratio to 0
    assert course([], "loss")[0] == []


def test_every_setting_has_its_curve():
    both = [history([4, 2], [1, 3]), history([2, 2], [3, 5])]
    settings = {
        "first": {"ABFT": (style_of("abft"), both), "E2E": (style_of("e2e"), [history([3, 1])])},
        "second": {"ABFT": (style_of("abft"), both[:1])},
        "nothing": {"ABFT": (style_of("abft"), [[]])},
    }
    figure = course_figure(settings)
    shown = [title for name, title in PANELS.items() if name in both[0][0]]
    axes = np.array(figure.axes).reshape(2, len(shown))
    assert [axis.get_title() for axis in axes[0]] == shown
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["first", "second"]
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes[0, 0].lines}
    assert curves == {"ABFT": [1, 0.75], "E2E": [1, 1 / 3]}
    assert [line.get_label() for line in axes[0, 1].lines] == ["ABFT"]
    band = axes[0, 1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ABFT", "E2E"]
    assert course_figure({"a": {"ABFT": (style_of("abft"), [[]])}}) is None


def test_every_method_has_a_style(monkeypatch):
    assert len({style_of(name) for name in METHODS}) == len(METHODS)
    monkeypatch.setitem(METHODS, "another", METHODS["abft"])
    assert style_of("another") == generated_style(len(METHODS) - 1)
    assert len({generated_style(number) for number in range(40)}) == 40
