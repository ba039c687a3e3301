"""Prompt embeddings: one run of the text encoder a prompt, remembered, checked."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from sdrt.errors import BundleError, ParityError, RequestError
from sdrt.text import PromptEncoder
from sdrt.tokenizer import Tokenizer


class LookupEncoder:
    """A text encoder that embeds each token as (id, position)."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []
        self.spoil = float("nan")
        self.spoilt_run = -1
        self.inside = 0

    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert component == "text_encoder"
        self.inside += 1
        assert self.inside == 1, "a runner has one caller at a time"
        ids = feeds["input_ids"]
        self.runs.append(ids)
        position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        states = np.stack([ids, position], axis=-1).astype(np.float32)
        if len(self.runs) - 1 == self.spoilt_run:
            states[0, 3, 1] = self.spoil
        self.inside -= 1
        return {"last_hidden_state": states}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    model = {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    return Tokenizer.load(folder)


@pytest.fixture
def runner() -> LookupEncoder:
    return LookupEncoder()


def test_the_encoder_reads_one_row_of_int64_ids(tokenizer, runner):
    embeds = PromptEncoder(tokenizer, runner).encode("red")
    (fed,) = runner.runs
    assert fed.shape == (1, 77)
    assert fed.dtype == np.int64
    assert embeds.shape == (77, 2)
    assert embeds.dtype == np.float32
    assert embeds[:, 0].tolist() == tokenizer.encode("red").ids.tolist()


def test_a_prompt_is_encoded_once(tokenizer, runner):
    prompts = PromptEncoder(tokenizer, runner)
    first = prompts.encode("red")
    assert prompts.encode("red") is first
    assert prompts.encode("  RED ") is first
    assert len(runner.runs) == 1


def test_the_empty_prompt_is_a_prompt(tokenizer, runner):
    prompts = PromptEncoder(tokenizer, runner)
    assert prompts.encode("").shape == (77, 2)
    assert prompts.dropped("") == ""
    assert not np.array_equal(prompts.encode(""), prompts.encode("a"))


def test_the_least_recently_used_prompt_is_forgotten(tokenizer, runner):
    prompts = PromptEncoder(tokenizer, runner, capacity=2)
    for text in ("a", "b", "a", "c", "a"):
        prompts.encode(text)
    assert len(runner.runs) == 3
    prompts.encode("b")
    assert len(runner.runs) == 4


def test_a_remembered_result_cannot_be_changed(tokenizer, runner):
    embeds = PromptEncoder(tokenizer, runner).encode("a")
    with pytest.raises(ValueError, match="read-only"):
        embeds[0, 0] = 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_result_that_is_not_finite_is_an_error_and_is_not_remembered(tokenizer, runner, value):
    prompts = PromptEncoder(tokenizer, runner)
    runner.spoilt_run, runner.spoil = 0, value
    with pytest.raises(ParityError, match="text_encoder made 1 of 154 values") as caught:
        prompts.encode("a")
    assert "fp32" in caught.value.hint
    assert np.isfinite(prompts.encode("a")).all()
    assert len(runner.runs) == 2


def test_a_result_of_another_shape_is_a_bundle_error(tokenizer):
    class Pooled(LookupEncoder):
        def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"last_hidden_state": np.zeros((1, 2), np.float32)}

    with pytest.raises(BundleError, match=r"\(1, 2\)"):
        PromptEncoder(tokenizer, Pooled()).encode("a")


def test_what_is_dropped_is_reported(tokenizer, runner):
    assert PromptEncoder(tokenizer, runner).dropped("a " * 75 + "tail end") == "tail end"


def test_threads_share_one_encoder(tokenizer, runner):
    prompts = PromptEncoder(tokenizer, runner, capacity=3)
    wrong: list[str] = []

    def work(texts: str) -> None:
        for text in texts * 20:
            if prompts.encode(text)[1, 0] != tokenizer.encode(text).ids[1]:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(texts,)) for texts in ("abcde", "edcba", "cabed", "bdace")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cache_of_nothing_is_refused(tokenizer, runner):
    with pytest.raises(RequestError, match="0 entries"):
        PromptEncoder(tokenizer, runner, capacity=0)
