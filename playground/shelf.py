"""The models that a page offers: a fixed list, of which the engine has one loaded."""

from __future__ import annotations

from collections.abc import Sequence

from playground.api import Playground
from playground.checkpoint.hub import local_folder
from playground.engine.client import Answers, Client
from playground.engine.requests import Switch
from playground.engine.settings import RequestError

EMBEDDED_NAME = "storyteller"


class Shelf:
    """`models`: folders or Hub ids, as the engine was given them; none: the embedded model."""

    def __init__(self, client: Client, models: Sequence[str] = ()):
        self.client, self.embedded = client, not models
        self.names = tuple(dict.fromkeys(models)) or (EMBEDDED_NAME,)
        self._current: Playground | None = None

    @property
    def name(self) -> str:
        """Of the current model, one of `names`."""
        return self.current.info.key.partition(":")[2] or EMBEDDED_NAME

    @property
    def labels(self) -> list[tuple[str, str]]:
        """What to show for each name: a folder's own name alone, where that tells the models apart."""
        short = [folder.name if (folder := local_folder(name)) else name for name in self.names]
        return list(zip(short if len(set(short)) == len(short) else self.names, self.names, strict=True))

    @property
    def current(self) -> Playground:
        """The model that is loaded, or is being loaded: requests wait for it. Raises `RequestError` before the engine
        has said which one that is."""
        info, known = self.client.info, self._current
        if info is None:
            raise RequestError("The engine is starting; try again in a moment.")
        if known is None or known.info.key != info.key:
            known = self._current = Playground(self.client, info)
        return known

    def switch(self, name: str) -> Answers:
        """Makes another model of the list the current one; answered by `Progress`, then by `ModelInfo`."""
        return self.client.ask(Switch("" if self.embedded else name))
