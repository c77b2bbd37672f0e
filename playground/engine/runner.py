"""Takes the scheduler's batches to the device: prefill chunks, decode steps, copies of pages. It knows the model and
the cache's tensors, and nothing of requests, rows or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from playground.engine.batch import Copies, DecodeBatch, PrefillChunk
from playground.engine.cache import PagedCache
from playground.engine.decoder import Drawn, EagerDecoder, Variant, draw_output, make_decoder
from playground.engine.graph import Recorder, sent
from playground.engine.history import Histories
from playground.engine.prefill import Fed, Prefill
from playground.engine.sampler import Settings
from playground.model.transformer import Transformer

CPU_THREADS = torch.get_num_threads()  # before any decode has asked for one
SHORT = 64  # tokens of a chunk: with two threads as with one 23 ms for 5, 41 to 46 for 33, 53 and 48 for 65


class Runner:
    """`cache_tokens` for all rows together, `context` for each."""

    def __init__(self, model: Transformer, cache_tokens: int, context: int, cache_dtype: torch.dtype):
        self.model, self.context = model, context
        self.cache = PagedCache(model.config, cache_tokens, model.device, cache_dtype)
        self.on_card = model.device.type == "cuda"
        recorder = Recorder(model.device) if self.on_card else None
        self.prefill = Prefill(model, self.cache, recorder)
        self.decoder = make_decoder(model, self.cache, context, recorder)

    @torch.inference_mode()
    def feed(self, chunk: PrefillChunk) -> Drawn | None:
        """Feeds a chunk; after a prompt's last one, draws its rows' first tokens."""
        self.use_threads_for(len(chunk.tokens))
        ends, traced = bool(chunk.draws), any(draw.traced for draw in chunk.draws)
        fed = self.prefill.feed(chunk.tokens, chunk.start, chunk.pages, traced, ends)
        if fed is None:
            if self.on_card:
                torch.cuda.synchronize(self.model.device)  # or the chunk's time would be that of launching it
            return None
        self.copy(chunk.copies)
        return self._first_draw(chunk, fed)

    def _first_draw(self, chunk: PrefillChunk, fed: Fed) -> Drawn:
        """Draws every row's first token from what the end of their prompt leaves, or will leave."""
        device, count = self.model.device, len(chunk.draws)
        params, variant, histories = [draw.params for draw in chunk.draws], Variant.of(chunk.draws), None
        if variant.needs.penalised:
            histories = Histories.of(chunk.histories, params, self.model.config.vocab_size, device)
        settings = Settings.of(params, device)
        length = chunk.start + len(chunk.tokens)
        at = sent(torch.full((count,), length), device)  # copied, not filled there: a draw reads it before it waits
        logits = fed.logits.expand(count, -1).contiguous()
        output = draw_output(logits, settings, at, variant, fed.trace, histories)
        return output.read(fed.trace and fed.trace.layout(), count)

    def copy(self, copies: Copies) -> None:
        for source, target in copies:
            self.cache.copy(source, target)

    @torch.inference_mode()
    def start(self, batch: DecodeBatch) -> Callable[[], Drawn]:
        """Begins a step of these rows; what it returns waits for its end."""
        self.use_threads(1)
        self.decoder.load(batch)
        return self.decoder.step()

    @torch.inference_mode()
    def again(self) -> Callable[[], Drawn]:
        """Begins one more step of the same rows, whether or not the one before has been read."""
        self.use_threads(1)
        return self.decoder.step()

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can begin before the one before it has been read."""
        return self.decoder.runs_ahead

    @property
    def wants_reload(self) -> bool:
        """Whether the same rows would run better if they were started anew."""
        return self.decoder.wants_reload

    @torch.inference_mode()
    def one_by_one(self, batch: DecodeBatch) -> list[Drawn | Exception]:
        """The step of each row by itself, after it failed for all together: which of them can't go on."""
        results: list[Drawn | Exception] = []
        decoder = EagerDecoder(self.model, self.cache)
        for row in batch.rows:
            try:
                decoder.load(DecodeBatch((row,)))
                results.append(decoder.step()())
            except Exception as error:  # whatever it is, it is this row's
                results.append(error)
        return results

    @torch.inference_mode()
    def feed_alone(self, prompt: Sequence[int], pages: Sequence[int], start: int, end: int, traced: bool) -> Fed | None:
        """Feeds a chunk of a prompt that is nobody's into `pages`; after the last, what it leaves, copied."""
        self.use_threads_for(end - start)
        fed = self.prefill.feed(prompt[start:end], start, pages, traced, end == len(prompt))
        return fed and Fed(fed.logits.clone(), fed.trace)

    def use_threads_for(self, tokens: int) -> None:
        """Of a prefill chunk: a short one gains nothing from a second thread, which would wait on a core that the page
        needs to show its first token."""
        self.use_threads(CPU_THREADS if tokens > SHORT else 1)

    def use_threads(self, count: int) -> None:
        """Decode on a CPU is a thousand small operations bound by memory: one thread runs them nearly twice as fast
        as two that meet after each (measured on 2 cores: 43 against 25 tokens/s). Prefill takes them all."""
        if not self.on_card and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def wait(self) -> None:
        """For what is under way: it writes to memory that would be somebody else's."""
        if self.on_card:
            with suppress(RuntimeError):  # a card that has failed has said so
                torch.cuda.synchronize(self.model.device)


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: after a fault of a kernel every later call fails alike."""
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or "CUDA error" in str(error) or "device-side assert" in str(error)
