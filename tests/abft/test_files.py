"""Files that are written whole or not at all, whatever cuts the writing off."""

import json
import os

import pytest
import torch

from abft.files import write_json


@pytest.mark.parametrize("moment", ["half written", "moved"])
def test_json_is_whole_or_old(moment, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "results.json"
    write_json(path, {"accuracy": 0.5, "name": "µ"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": 0.5, "name": "µ"}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    fdopen = os.fdopen

    def broken(*arguments, **options):
        file = fdopen(*arguments, **options)
        file.write("half")
        file.close()
        interrupted()

    if moment == "half written":
        monkeypatch.setattr("abft.files.os.fdopen", broken)
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
