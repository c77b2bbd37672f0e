"""The models that a page offers: a fixed list, of which one is loaded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence

import torch

from playground.api import Playground, Progress, check, load
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.hub import local_folder
from playground.engine.requests import RequestError

EMBEDDED_NAME = "storyteller"


class Shelf:
    """`models`: folders or Hub ids; none: the embedded model. `options` are those of `load`, for all of them alike.

    The first is loaded at once; raises `CheckpointError` if that fails. Close it, or use it as a context manager.
    """

    def __init__(self, models: Sequence[str], **options):
        self.names = list(dict.fromkeys(models)) or [EMBEDDED_NAME]
        self.embedded = not models
        self.options = options
        self.loading = threading.Lock()
        self.name, self._current = self.names[0], self._load(self.names[0])

    @property
    def labels(self) -> list[tuple[str, str]]:
        """What to show for each name: a folder's own name alone, where that tells the models apart."""
        short = [folder.name if (folder := local_folder(name)) else name for name in self.names]
        return list(zip(short if len(set(short)) == len(short) else self.names, self.names, strict=True))

    @property
    def current(self) -> Playground:
        """Raises `RequestError` while a model is being loaded, and after a failure that nothing could mend."""
        playground = self._current
        if playground is None:
            raise RequestError("A model is being loaded; wait until it is ready and run again.")
        return playground

    def switch(self, name: str, progress: Progress | None = None) -> None:
        """Makes another model of the list the current one: the old one is released first, so that both need not fit.

        Raises `CheckpointError`; the old model is then the current one again. What can be told without loading
        (another name, a damaged folder) is told before the old one is touched.
        """
        if name not in self.names:
            raise CheckpointError(f"{name!r} is not one of the models of this page: {', '.join(self.names)}.")
        if not self.loading.acquire(blocking=False):
            raise CheckpointError("Another model is being loaded; wait until it is ready.")
        try:
            if name == self.name and self._current is not None:
                return
            if not self.embedded:
                check(name, self.options.get("dtype", "auto"))
            self._release()
            failure = self._try(name, progress)
            if failure is not None:  # outside of `except`, whose traceback would hold on to what was half loaded
                _collect()
                self._current = self._load(self.name)
                raise CheckpointError(f"{name} could not be loaded, {self.name} is back: {failure}")
        finally:
            self.loading.release()

    def _load(self, name: str, progress: Progress | None = None) -> Playground:
        return load(None if self.embedded else name, **self.options, progress=progress)

    def _try(self, name: str, progress: Progress | None) -> str | None:
        """Loads `name`; what went wrong, in words, or None."""
        try:
            self._current = self._load(name, progress)
            self.name = name
        except Exception as error:  # whatever stops a load, the old model must come back
            return str(error) or type(error).__name__
        return None

    def _release(self) -> None:
        old, self._current = self._current, None
        if old is not None:
            old.close()
            del old
            _collect()

    def close(self) -> None:
        self._release()

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
