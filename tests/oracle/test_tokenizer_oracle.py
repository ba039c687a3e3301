"""Token ids against transformers' CLIPTokenizer, for both layouts and for the special tokens of SD1 and SD2."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sdrt.models.shapes.train import build_tokenizer
from sdrt.tokenizer import Tokenizer

CORPUS = (
    "a photo of an astronaut riding a horse on mars, highly detailed, it's 8k!!",
    "ein blauer Würfel über dem Meer, naïve façade, Ελληνικά και Русский текст",
    "漢字 と かな 😀 👩‍👩‍👧 🇫🇷 the astronaut's photo, we'll see: they've been there",
)


def token_object(text: str, **more: object) -> dict[str, object]:
    """A special token as checkpoints of 2022 describe it."""
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **more}


def write_legacy(source: Path, folder: Path, **special: object) -> Path:
    """The layout of SD1.5's and SD2's tokenizer folders, with the same vocabulary as `source`."""
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    begin, end = "<|startoftext|>", "<|endoftext|>"
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **token_object(begin)},
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **token_object(end)},
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": end,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **token_object(end)},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    named = {"bos_token": token_object(begin), "eos_token": token_object(end), "unk_token": token_object(end)}
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, "pad_token": end} | special))
    return folder


def add_words(folder: Path, words: list[str]) -> Path:
    """New tokens behind the vocabulary, as textual inversion adds them."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    return folder


def write_added_tokens_file(folder: Path, words: list[str]) -> Path:
    size = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({word: size + index for index, word in enumerate(words)}))
    return folder


def write_config_with_decoder(source: Path, folder: Path) -> Path:
    """What transformers 4.3x wrote: tokens by id inside tokenizer_config.json, here SD2's "!" as padding."""
    write_legacy(source, folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    special = {"!": False, "<|startoftext|>": True, "<|endoftext|>": True}
    decoder = {
        str(vocabulary[text]): token_object(text, special=True, normalized=flag) for text, flag in special.items()
    }
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": decoder, "pad_token": "!", "bos_token": "<|startoftext|>"}
    config |= {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


LAYOUTS = ("tokenizer.json", "SD1", "SD2", "decoder", "words", "added_tokens.json")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CLIPTokenizer, Tokenizer]]:
    root = tmp_path_factory.mktemp("tokenizers")
    source = root / "source"
    build_tokenizer(CORPUS * 2, source)
    build_tokenizer(CORPUS * 2, root / "words")
    words = ["<my-cat>", "Astro", "naïve"]
    folders = {
        "tokenizer.json": source,
        "SD1": write_legacy(source, root / "sd1"),
        "SD2": write_legacy(source, root / "sd2", pad_token="!"),
        "decoder": write_config_with_decoder(source, root / "decoder"),
        "words": add_words(root / "words", words),
        "added_tokens.json": write_added_tokens_file(write_legacy(source, root / "added"), words),
    }
    return {name: (CLIPTokenizer.from_pretrained(folder), Tokenizer.load(folder)) for name, folder in folders.items()}


def check(pairs: dict[str, tuple[CLIPTokenizer, Tokenizer]], layout: str, text: str) -> None:
    reference, tokenizer = pairs[layout]
    expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert tokenizer.encode(text).ids.tolist() == expected


SPECIAL = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|EndOfText|>",
    "<my-cat>",
    "Astro",
    "astronaut",
    "!",
    "!!",
    "'ll",
    "'S",
)
UNUSUAL = (
    "naïve",
    "nai\u0308ve",
    "😀",
    "👩‍👩‍👧",
    "\u3000",
    "\x00",
    "\ufeff",
    "İ",
    "ﬁ",
    "½",
    "\u00ad",
    "\U0010ffff",
    "12",
)
PIECES = st.sampled_from([*SPECIAL, *UNUSUAL, " ", " the ", "\n"])
TEXTS = st.one_of(
    st.text(),
    st.text(st.characters(codec="latin-1")),
    st.lists(PIECES | st.text(max_size=4)).map("".join),
    st.lists(PIECES, min_size=40, max_size=120).map("".join),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(text=TEXTS)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_gives_the_ids_of_transformers(pairs, layout, text):
    check(pairs, layout, text)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["", "   ", "\n\t", "photo", "PHOTO!", *CORPUS])
def test_chosen_texts_give_the_ids_of_transformers(pairs, layout, text):
    check(pairs, layout, text)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("words", [74, 75, 76, 77, 78, 150, 1000])
def test_long_prompts_are_cut_where_transformers_cuts(pairs, layout, words):
    check(pairs, layout, "photo " * words)


@pytest.mark.parametrize("layout", ["tokenizer.json", "SD2"])
def test_what_is_dropped_holds_the_tokens_that_transformers_drops(pairs, layout):
    reference, tokenizer = pairs[layout]
    text = " ".join(CORPUS * 3)
    dropped = tokenizer.encode(text).dropped
    beyond = reference(text, add_special_tokens=False).input_ids[75:]
    assert dropped != ""
    assert reference(dropped, add_special_tokens=False).input_ids[-5:] == beyond[-5:]
    assert len(reference(dropped, add_special_tokens=False).input_ids) >= len(beyond)
