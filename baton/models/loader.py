"""Loads a Hugging Face folder's safetensors as they are, tensor by tensor, onto a decoder built on the meta device.

Every problem with a checkpoint is a BrokenCheckpoint that names the file and the tensor.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open

from baton.errors import BrokenCheckpoint
from baton.models.config import ModelConfig, read_json
from baton.models.decoder import Decoder

_SAMPLE_BYTES = 4096
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def empty_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model with room for its weights."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def dummy_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model with random weights, the same each time, to be prepared."""
    model = empty_model(config, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


def load_model(folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model with its weights, to be prepared. Shows a progress bar where stderr is a terminal."""
    model = empty_model(config, dtype=dtype, device=device)
    parameters = dict(model.named_parameters())
    missing = {name: parameter.shape[0] for name, parameter in parameters.items()}  # rows still to come
    files = weight_files(folder)
    with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"loading {folder.name}", total=sum(path.stat().st_size for path in files))
        for path in files:
            for name, tensor in _tensors(path):
                _place(name, tensor, config, parameters, missing, path)
                progress.advance(bar, tensor.nbytes)
    lost = sorted(name for name, rows in missing.items() if rows)
    if lost:
        raise BrokenCheckpoint(f"{folder}: tensors are missing: {', '.join(lost[:5])} ({len(lost)} in all); download the model again")
    return model


def weight_files(folder: Path) -> list[Path]:
    """All safetensors of the model: those of the index, or the only one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    absent = [path.name for path in files if not path.is_file()]
    if absent or not files:
        raise BrokenCheckpoint(f"{folder}: {', '.join(absent) or 'weights'} missing; the folder must hold the model's safetensors files")
    return files


def weights_fingerprint(folder: Path) -> str:
    """Hex. Covers config.json, every file's size and header, and the first bytes of each tensor: quick for any size, and different for
    any two trainings."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise BrokenCheckpoint(f"{path} is truncated: its header alone needs {length + 8} bytes of {size}; download it again")
            header = file.read(length)
            digest.update(size.to_bytes(8, "little") + header)
            try:
                spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BrokenCheckpoint(f"{path} has no readable safetensors header; download it again") from error
            for start, end in sorted(spans):
                file.seek(8 + length + start)
                digest.update(file.read(min(_SAMPLE_BYTES, end - start)))
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read ({error}); it is damaged or truncated: download it again") from error


def _place(
    name: str, tensor: torch.Tensor, config: ModelConfig, parameters: Mapping[str, torch.Tensor], missing: dict[str, int], path: Path
) -> None:
    if _IGNORED.search(name) or (name == "lm_head.weight" and config.tie_embeddings):
        return
    target, first, rows = _target(name, config)
    parameter = parameters.get(target)
    if parameter is None:
        raise BrokenCheckpoint(f"{path.name}: unexpected tensor {name}; config.json and weights are not of the same model")
    part = parameter if rows is None else parameter[first : first + rows]
    if part.shape != tensor.shape:
        raise BrokenCheckpoint(f"{path.name}: {name} has shape {list(tensor.shape)}, but config.json calls for {list(part.shape)}")
    part.copy_(tensor)
    missing[target] -= part.shape[0]


def _target(name: str, config: ModelConfig) -> tuple[str, int, int | None]:
    """Our parameter, and which of its rows (None: all), for a checkpoint's tensor."""
    q, kv, up = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    merged = {
        "q_proj": ("qkv_proj", 0, q),
        "k_proj": ("qkv_proj", q, kv),
        "v_proj": ("qkv_proj", q + kv, kv),
        "gate_proj": ("gate_up_proj", 0, up),
        "up_proj": ("gate_up_proj", up, up),
    }
    head, _, part = name.rpartition(".")
    stem, _, module = head.rpartition(".")
    if module in merged:
        target, first, rows = merged[module]
        return f"{stem}.{target}.{part}", first, rows
    return name, 0, None
