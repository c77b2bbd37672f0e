"""A bar on the terminal while a model is loaded, where that takes long."""

from __future__ import annotations

from tqdm import tqdm


class Bar:
    """Called with the bytes that are there, and all of them."""

    def __init__(self):
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        self.bar = self.bar or tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1, leave=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
