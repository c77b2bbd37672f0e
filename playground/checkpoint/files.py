"""Model folders in the Hub's DeepSeek-V3 format: `config.json`, `tokenizer.json`, sharded safetensors with an index."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import kernels
from playground.checkpoint.config import BLOCK_SIZE, CheckpointError
from playground.checkpoint.families import parse_config, weight_count
from playground.model.loading import SCALE_SUFFIX, Header

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
MODELOPT = "hf_quant_config.json"
_MAX_JSON = 64 << 20  # the index of the largest known checkpoint has 9 MB
COPYING, AHEAD = 4, 256 << 20  # threads that copy tensors, and bytes that they may be ahead of who takes them
SHARD_BYTES = 9_000_000  # a plain push to a Space refuses files over 10 MB
KEPT_IN_BF16 = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Whether DeepSeek-V3's format stores this tensor as FP8: every projection, but not embedding, head and gate."""
    return tensor.ndim == 2 and not name.endswith(KEPT_IN_BF16)


def _stored_form(state: dict[str, torch.Tensor], fp8: bool) -> dict[str, torch.Tensor]:
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if fp8 and is_quantised(name, tensor):
            # quantise what the BF16 checkpoint holds, so that both forms descend from the same weights
            stored[name], stored[name + SCALE_SUFFIX] = kernels.weight_quant(tensor.bfloat16())
        else:
            stored[name] = tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    return stored


def save_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """Writes tensors on the CPU, as they come, to safetensors files of about `shard_bytes` at most, and their index."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def save() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            save()
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    save()
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):  # a file's name says how many there are
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number - 1}").replace(folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], tokenizer, fp8: bool) -> None:
    """Writes a whole model folder; `fp8` chooses block-scaled FP8 projections, otherwise everything is BF16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(folder, _stored_form(state, fp8).items(), SHARD_BYTES)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
    }
    files = {
        "config.json": config | ({"quantization_config": quantization} if fp8 else {}),
        GENERATION: {k: config[k] for k in ("bos_token_id", "eos_token_id")},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def _read_json(folder: Path, name: str) -> Any:
    if not (folder / name).is_file() and (folder / name).exists():  # a pipe would be waited for, and a device read
        raise CheckpointError(f"{folder / name} is no ordinary file.")
    try:
        if (folder / name).stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{folder / name} is larger than {_MAX_JSON >> 20} MB; that is no {name}.")
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {name}: a model folder holds config.json, tokenizer.json and safetensors files."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} can't be read as JSON: {error}") from None


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Each safetensors file and the tensors that the index expects in it (None: whatever it holds)."""
    if not (folder / INDEX).exists():
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"{folder} has neither {INDEX} nor model.safetensors.")
        return {"model.safetensors": None}
    index = _read_json(folder, INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files.")
    shards: dict[str, set[str] | None] = {}
    for tensor, file in where.items():
        if Path(file).name != file or "\0" in file or not (folder / file).is_file():
            raise CheckpointError(f"{INDEX} places {tensor} in {file!r}, which is not a file in {folder}.")
        shards.setdefault(file, set()).add(tensor)
    return shards


_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class Checkpoint:
    """A model folder whose config and headers have been read, and no weight yet.

    Raises `CheckpointError`, naming the file, for whatever is not a whole checkpoint of a supported architecture.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; name one that holds config.json and safetensors files.")
        self.folder = folder
        self.generation = _read_json(folder, GENERATION) if (folder / GENERATION).exists() else None
        config = _read_json(folder, "config.json")
        if isinstance(config, dict) and "quantization_config" not in config and (folder / MODELOPT).exists():
            told = _read_json(folder, MODELOPT)  # what its config.json did not say in earlier versions
            about = told.get("quantization") if isinstance(told, dict) else None
            config["quantization_config"] = {"quant_method": "modelopt"} | (about if isinstance(about, dict) else {})
        self.config = parse_config(config, self.generation)
        self.headers: dict[str, Header] = {}
        for file, expected in _shards(folder).items():
            self._read_headers(file, expected)
        if "lm_head.weight" in self.headers:  # a head of its own counts, whatever the config says
            self.config = replace(self.config, tie_word_embeddings=False)
        stored = sum(math.prod(h.shape) for h in self.headers.values())
        if weight_count(replace(self.config, intermediate_size=1)) > 1.01 * stored:
            raise CheckpointError(f"config.json describes a larger model than the {stored} numbers in {folder}.")

    def _read_headers(self, file: str, expected: set[str] | None) -> None:
        with self._open(file) as shard:
            names = set(shard.keys())
            if expected is not None and names != expected:
                odd = sorted(names ^ expected)[0]
                raise CheckpointError(f"{file} and {INDEX} disagree about tensor {odd}.")
            for name in names:
                part = shard.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{file}: tensor {name} has type {part.get_dtype()}, which is not supported.")
                self.headers[name] = Header(file, tuple(part.get_shape()), dtype)

    @contextmanager
    def _open(self, file: str, device: str = "cpu") -> Iterator[Any]:
        try:
            with safe_open(self.folder / file, framework="pt", device=device) as shard:
                yield shard
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file} is not a whole safetensors file: {error}") from None

    @property
    def bytes(self) -> int:
        return sum(h.bytes for h in self.headers.values())

    def tensors(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor once, from the memory map straight to `device`; nothing is ever unpickled.

        Layer by layer inside a shard, so that a weight and its scales come close together. Several threads copy: one
        alone takes longer to touch the pages of a memory map than a card to receive them.
        """
        files = sorted({h.file for h in self.headers.values()})
        with _read_ahead([self.folder / file for file in files]) as done, ThreadPoolExecutor(COPYING) as pool:
            for file in files:
                with self._open(file, str(device)) as shard:
                    yield from self._copied(shard, pool)
                done()

    def _copied(self, shard: Any, pool: ThreadPoolExecutor) -> Iterator[tuple[str, torch.Tensor]]:
        """A shard's tensors in order, those that follow on their way."""
        copies: deque[tuple[str, Future]] = deque()
        ahead = 0
        try:
            for name in sorted(shard.keys()):
                copies.append((name, pool.submit(shard.get_tensor, name)))
                ahead += self.headers[name].bytes
                while ahead > AHEAD:
                    first, copy = copies.popleft()
                    ahead -= self.headers[first].bytes
                    yield first, copy.result()
            while copies:
                name, copy = copies.popleft()
                yield name, copy.result()
        finally:  # whatever ended it: a shard can't be closed while a thread copies from it
            for _, copy in copies:
                copy.cancel()
            wait([copy for _, copy in copies])


@contextmanager
def _read_ahead(paths: list[Path]) -> Iterator[Callable[[], object]]:
    """Brings files into the page cache on a thread, in order, at most one beyond the file in use; yields what to call
    when a file is done with. A memory map alone reaches three quarters of a disk's rate: it reads a little at a time,
    and not while a tensor is on its way to the device."""
    wanted, ended = threading.Semaphore(2), threading.Event()

    def read() -> None:
        piece = bytearray(16 << 20)
        for path in paths:
            wanted.acquire()
            try:
                with open(path, "rb", buffering=0) as file:
                    while not ended.is_set() and file.readinto(piece):
                        pass
            except OSError:
                return  # whoever needs the file meets the error, and can say it

    threading.Thread(target=read, name="read-ahead", daemon=True).start()
    try:
        yield wanted.release
    finally:
        ended.set()
        for _ in paths:  # nobody waits for a file that is not wanted any more
            wanted.release()
