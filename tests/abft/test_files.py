"""Files that are written whole or not at all, whatever cuts the writing off."""

import json
import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from abft.files import save_figure, whole, write_json


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["half written", "moved"])
def test_json_is_whole_or_old(moment, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "results.json"
    write_json(path, {"accuracy": 0.5, "name": "µ"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": 0.5, "name": "µ"}

    def broken(self, text, **options):
        self.write_bytes(text[:4].encode())
        interrupted()

    if moment == "half written":
        monkeypatch.setattr(Path, "write_text", broken)
    else:  # all is written, nothing moved
        monkeypatch.setattr("abft.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"accuracy": 0.9})
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == 0.5
    assert os.listdir(path.parent) == ["results.json"]


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"tensor": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_a_figure_has_the_format_of_its_suffix(tmp_path, monkeypatch):
    save_figure(Figure(figsize=(2, 1)), tmp_path / "figure.png", dpi=100, tight=False)
    save_figure(Figure(figsize=(2, 1)), tmp_path / "figure.svg")
    png = (tmp_path / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (200, 100)
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_figure(Figure(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == png
    assert sorted(os.listdir(tmp_path)) == ["figure.png", "figure.svg"]


def test_a_folder_appears_whole(tmp_path):
    def cut_off():
        with whole(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "config.json").touch()
            raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        cut_off()
    assert os.listdir(tmp_path) == []
    with whole(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "config.json").touch()
        assert not (tmp_path / "model").exists()
    assert os.listdir(tmp_path / "model") == ["config.json"]


def test_files_are_readable_as_the_process_asks(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "results.json", {})
    finally:
        os.umask(old)
    assert (tmp_path / "results.json").stat().st_mode & 0o777 == 0o640
