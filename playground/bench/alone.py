"""How fast the engine alone writes, with the inspector on, in a process of its own: what the page is held against."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from playground.bench.timing import RUNS, steady_rate, write
from playground.checkpoint.config import CheckpointError
from playground.engine.decoder import PATIENCE
from playground.engine.engine import Engine, driven
from playground.engine.gate import faults
from playground.engine.loading import MAX_ROWS, choose_cache, choose_device, load_model


def rate(engine: Engine, rows: int, prompt: int, tokens: int) -> float | None:
    """Tokens per second of all rows, the median of some runs behind a warm-up; None where they never write together."""
    for _ in range(1 + (PATIENCE // tokens + 1 if engine.model.device.type == "cuda" else 0)):
        write(engine, rows, prompt, tokens, inspect=True)
    try:
        return round(statistics.median(steady_rate(engine, rows, prompt, tokens, True) for _ in range(RUNS)), 1)
    except CheckpointError:
        return None


@torch.inference_mode()
def main() -> int:
    """The task is `[folder, options of a model, rows, prompt, tokens]` in JSON; prints one JSON object."""
    folder, options, rows, prompt, tokens = json.loads(sys.argv[1])
    try:
        device = choose_device(options["device"])
        # Prompts come one after another: the first row must not end before the last has begun. The gate wants 128.
        tokens = max(tokens, 2 * max(rows) + 16)
        context = max(prompt + tokens, 128)
        room = options["context"] and max(options["context"], context)
        model, _ = load_model(Path(folder), device, None, options["dtype"], room, options["cache_dtype"])
        tokens = min(tokens, model.config.max_position_embeddings - prompt)
        cache_dtype = choose_cache(options["cache_dtype"], model.dtype)
        engine = Engine(model, None, MAX_ROWS, context=context, cache_dtype=cache_dtype, share_prefixes=False)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    wrong = list(driven(engine, faults(model, engine)))
    rates = {} if wrong else {count: rate(engine, count, prompt, tokens) for count in rows}
    print(json.dumps({"device": name, "cache": str(cache_dtype)[6:], "faults": wrong, "rates": rates}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
