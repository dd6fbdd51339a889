"""Loads a Hugging Face folder's safetensors as they are, tensor by tensor, onto a decoder built on the meta device. A rank of a group reads
its share of each, and no more.

Every problem with a checkpoint is a BrokenCheckpoint that names the file and the tensor.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open

from baton.errors import BrokenCheckpoint
from baton.models.config import ModelConfig, read_json
from baton.models.decoder import Decoder
from baton.parallel.group import ALONE, Group

_SAMPLE_BYTES = 4096
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_SHARED_ALONG = {"o_proj": 1, "down_proj": 1} | dict.fromkeys(
    ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"), 0
)
"""The dimension of a weight that ranks share, by module; the others each has whole."""
_VOCABULARY = ("embed_tokens", "lm_head")
_OF_RANK_0 = ("o_proj.bias", "down_proj.bias")


def empty_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device, group: Group = ALONE) -> Decoder:
    """The model with room for its weights."""
    with torch.device("meta"):
        model = Decoder(config, group)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def dummy_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device, group: Group = ALONE) -> Decoder:
    """The model with random weights, the same each time and for any number of ranks, to be prepared."""
    model = empty_model(config, dtype=dtype, device=device, group=group)
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        whole = Decoder(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, like in whole.named_parameters():
        full = torch.empty(like.shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            full.fill_(1.0)
        else:
            full.normal_(0.0, 0.02, generator=generator)
        for part, first, rows in _parts(name, config):
            place = _find(part, config, group, parameters)
            if place is not None:
                tensor = full if rows is None else full[first : first + rows]
                place.room.copy_(tensor.narrow(place.dim, place.start, place.room.shape[place.dim]))
    return model


def load_model(folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, group: Group = ALONE) -> Decoder:
    """The model with its weights, to be prepared. Shows a progress bar where stderr is a terminal."""
    model = empty_model(config, dtype=dtype, device=device, group=group)
    parameters = dict(model.named_parameters())
    missing = {name: parameter.shape[0] for name, parameter in parameters.items()}  # rows still to come
    files = weight_files(folder)
    with Progress(console=Console(file=sys.stderr), disable=group.rank > 0 or not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"loading {folder.name}", total=sum(path.stat().st_size for path in files))
        for path in files:
            for stored in _tensors(path):
                _place(stored, config, group, parameters, missing)
            progress.advance(bar, path.stat().st_size)
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
    closed = [path.name for path in files if not os.access(path, os.R_OK)]
    if closed:
        raise BrokenCheckpoint(f"{folder}: {', '.join(closed)} cannot be read by user {os.geteuid()}; change the permissions, or the user")
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint's tensor, or this rank's share of it, belongs."""

    parameter: str
    rows: int  # of the parameter, that it fills
    room: torch.Tensor
    dim: int  # that ranks share
    start: int  # of the share
    whole: list[int]  # the tensor's shape, as config.json calls for it


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a file that is open."""

    path: Path
    name: str
    file: Any

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    def read(self, place: _Place) -> torch.Tensor:
        """Raises BrokenCheckpoint."""
        share = slice(place.start, place.start + place.room.shape[place.dim])
        try:
            if list(place.room.shape) == place.whole:
                return self.file.get_tensor(self.name)
            there = self.file.get_slice(self.name)
            return there[share] if place.dim == 0 else there[:, share]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error


def _tensors(path: Path) -> Iterator[_Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield _Stored(path, name, file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{path} cannot be read ({error}); it is damaged or truncated: download it again")


def _place(stored: _Stored, config: ModelConfig, group: Group, parameters: Mapping[str, torch.Tensor], missing: dict[str, int]) -> None:
    name, path = stored.name, stored.path
    if _IGNORED.search(name) or (name == "lm_head.weight" and config.tie_embeddings):
        return
    place = _find(name, config, group, parameters)
    if place is None:
        if group.rank and name.endswith(_OF_RANK_0):
            return
        raise BrokenCheckpoint(f"{path.name}: unexpected tensor {name}; config.json and weights are not of the same model")
    if stored.shape != place.whole:
        raise BrokenCheckpoint(f"{path.name}: {name} has shape {stored.shape}, but config.json calls for {place.whole}")
    place.room.copy_(stored.read(place))
    missing[place.parameter] -= place.rows


def _find(name: str, config: ModelConfig, group: Group, parameters: Mapping[str, torch.Tensor]) -> _Place | None:
    """None: there is no such parameter here."""
    target, first, rows = _target(name, config)
    parameter = parameters.get(target)
    if parameter is None:
        return None
    room = parameter if rows is None else parameter[first // group.size : (first + rows) // group.size]
    module = name.split(".")[-2]
    dim, whole = _SHARED_ALONG.get(module), list(room.shape)
    if dim is None or dim >= room.dim():
        return _Place(target, room.shape[0], room, 0, 0, whole)
    share = room.shape[dim]
    whole[dim] = config.vocab_size if module in _VOCABULARY else share * group.size
    start = min(group.rank * share, whole[dim])
    return _Place(target, room.shape[0], room.narrow(dim, 0, min(share, whole[dim] - start)), dim, start, whole)


def _merged(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Of a checkpoint's module: ours, and which of its rows, in the whole model."""
    q, kv, up = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    return {
        "q_proj": ("qkv_proj", 0, q),
        "k_proj": ("qkv_proj", q, kv),
        "v_proj": ("qkv_proj", q + kv, kv),
        "gate_proj": ("gate_up_proj", 0, up),
        "up_proj": ("gate_up_proj", up, up),
    }


def _target(name: str, config: ModelConfig) -> tuple[str, int, int | None]:
    """Our parameter, and which of its rows (None: all), for a checkpoint's tensor."""
    merged = _merged(config)
    head, _, part = name.rpartition(".")
    stem, _, module = head.rpartition(".")
    if module in merged:
        target, first, rows = merged[module]
        return f"{stem}.{target}.{part}", first, rows
    return name, 0, None


def _parts(name: str, config: ModelConfig) -> Sequence[tuple[str, int, int | None]]:
    """The other way round: the checkpoint's tensors that our parameter is made of."""
    module = name.split(".")[-2]
    parts = [(name.replace(module, theirs), first, rows) for theirs, (ours, first, rows) in _merged(config).items() if ours == module]
    return parts or [(name, 0, None)]
