"""Prompts to prompt embeddings: tokenise, run the text encoder, remember the result."""

import threading
from collections import OrderedDict

import numpy as np

from sdrt.errors import BundleError, ParityError, RequestError
from sdrt.runners.base import TEXT_ENCODER, FloatArray, Runner
from sdrt.tokenizer import Tokenizer


class PromptEncoder:
    """Embeds prompts with one runner and keeps the `capacity` most recently used results.

    The lock covers the runner's text encoder only: a runner has one caller at a time, so whoever shares
    it with other components serialises those calls.
    """

    def __init__(self, tokenizer: Tokenizer, runner: Runner, capacity: int = 256) -> None:
        if capacity < 1:
            raise RequestError(
                f"a prompt cache of {capacity} entries cannot be made", hint="use a capacity of 1 or more"
            )
        self._tokenizer = tokenizer
        self._runner = runner
        self._capacity = capacity
        self._recent: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, text: str) -> FloatArray:
        """The text encoder's last hidden state, float32 [L, d], read-only. An empty text is legal.

        Texts with the same tokens share one entry. Raises ParityError when the result is not finite,
        RequestError when the text is not Unicode.
        """
        ids = self._tokenizer.encode(text).ids
        key = ids.tobytes()
        with self._lock:
            if key not in self._recent:
                feeds = {"input_ids": ids[np.newaxis]}
                embeds = self._runner.run(TEXT_ENCODER, feeds)["last_hidden_state"]
                self._recent[key] = _checked(embeds, length=len(ids))
                while len(self._recent) > self._capacity:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(key)
            return self._recent[key]

    def dropped(self, text: str) -> str:
        """The end of the text that the text encoder does not see; "" when it sees all of it."""
        return self._tokenizer.encode(text).dropped


def _checked(embeds: FloatArray, *, length: int) -> FloatArray:
    if embeds.ndim != 3 or embeds.shape[:2] != (1, length):
        raise BundleError(
            f"{TEXT_ENCODER} made an array of shape {embeds.shape} from one prompt of {length} tokens",
            hint="rebuild the bundle from its checkpoint with: sdrt build",
        )
    if not np.isfinite(embeds).all():
        raise ParityError(
            f"{TEXT_ENCODER} made {np.count_nonzero(~np.isfinite(embeds))} of {embeds.size} values NaN or infinite",
            hint="build the bundle again with: --precision fp32",
        )
    result = np.ascontiguousarray(embeds[0], np.float32)
    result.setflags(write=False)
    return result
