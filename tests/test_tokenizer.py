"""Token ids from both layouts of a tokenizer folder, what is dropped, and damaged folders."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from sdrt.errors import BundleError, CheckpointError, RequestError
from sdrt.tokenizer import LONGEST_TEXT, Tokenizer

WORDS = ("red", "blue", "circle", "photo", "the", "!!")


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that build each word from its letters, left to right."""
    merges = {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(letters)):
            merges["".join(letters[:end]), letters[end]] = None
    return list(merges)


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    return {token: index for index, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}


MERGES = merges_of(WORDS)
VOCABULARY = vocabulary_of(MERGES)
BEGIN, END = VOCABULARY["<|startoftext|>"], VOCABULARY["<|endoftext|>"]


def write_tokenizer_json(folder: Path, *, merges_as_text: bool = False) -> Path:
    merges = [" ".join(merge) for merge in MERGES] if merges_as_text else MERGES
    model = {"type": "BPE", "vocab": VOCABULARY, "merges": merges}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    return folder


def write_legacy_files(folder: Path, *, newline: str = "\n", **special: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES), ""]
    (folder / "merges.txt").write_bytes(newline.join(lines).encode())
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def content(ids: np.ndarray) -> list[int]:
    """The ids between begin and end of text."""
    assert ids[0] == BEGIN
    return ids[1 : list(ids).index(END)].tolist()


def test_known_words_become_one_token_each(tokenizer):
    encoded = tokenizer.encode("The  RED\ncircle")
    assert content(encoded.ids) == [VOCABULARY[word] for word in ("the</w>", "red</w>", "circle</w>")]
    assert encoded.ids.shape == (77,)
    assert encoded.ids.dtype == np.int64
    assert encoded.dropped == ""


@pytest.mark.parametrize("text", ["", " ", "\n\t  \u3000"])
def test_an_empty_prompt_is_begin_end_and_padding(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert encoded.ids.tolist() == [BEGIN] + [END] * 76
    assert encoded.dropped == ""


def test_bytes_outside_the_merges_stay_single_letters(tokenizer):
    assert len(content(tokenizer.encode("😀").ids)) == 4


@pytest.mark.parametrize("write", [write_legacy_files, write_tokenizer_json])
def test_both_layouts_give_the_same_ids(write, tokenizer, tmp_path):
    other = Tokenizer.load(write(tmp_path))
    text = "a photo of the red circle!! naïve 😀 it's <|endoftext|> blue"
    assert other.encode(text).ids.tolist() == tokenizer.encode(text).ids.tolist()


def test_merges_may_be_written_as_text_and_with_carriage_returns(tokenizer, tmp_path):
    text = "photo circle"
    expected = tokenizer.encode(text).ids.tolist()
    assert (
        Tokenizer.load(write_tokenizer_json(tmp_path / "a", merges_as_text=True)).encode(text).ids.tolist() == expected
    )
    assert Tokenizer.load(write_legacy_files(tmp_path / "b", newline="\r\n")).encode(text).ids.tolist() == expected


def test_the_pad_token_is_the_checkpoints_own(tmp_path):
    ids = Tokenizer.load(write_legacy_files(tmp_path, pad_token="!")).encode("red").ids
    assert ids.tolist() == [BEGIN, VOCABULARY["red</w>"], END] + [VOCABULARY["!"]] * 74


@pytest.mark.parametrize(("words", "dropped"), [(74, 0), (75, 0), (76, 1), (148, 73), (1000, 925)])
def test_what_does_not_fit_is_reported_as_it_was_written(tokenizer, words, dropped):
    prompt = " ".join(f"{'Red' if index % 2 == 0 else 'bLue'}" for index in range(words))
    encoded = tokenizer.encode(prompt)
    assert len(encoded.ids) == 77
    assert encoded.ids[min(words, 75) + 1] == END
    assert encoded.dropped == " ".join(prompt.split()[words - dropped :])


def test_another_length_can_be_asked_for(folder):
    encoded = Tokenizer.load(folder, max_length=5).encode("red blue circle photo")
    assert encoded.ids.tolist()[-1] == END
    assert encoded.dropped == "photo"


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder, max_length=1000)


@given(text=st.text(min_size=20, max_size=150))
@settings(deadline=None)
def test_dropped_is_the_end_of_the_text_and_only_when_there_is_too_much(tokenizer, roomy, text):
    encoded = tokenizer.encode(text)
    assert text.endswith(encoded.dropped)
    assert (encoded.dropped != "") == (len(content(roomy.encode(text).ids)) > 75)


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"U\+D800 at position 3"):
        tokenizer.encode("red\ud800")


def test_an_endless_prompt_is_refused(tokenizer):
    with pytest.raises(RequestError, match="100,001 characters"):
        tokenizer.encode("a" * (LONGEST_TEXT + 1))


def damage_nothing_is_there(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_cut_off(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])


def damage_not_text(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe\0" * 10)


def damage_nested_without_end(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"a":' + "[" * 100_000)


def damage_no_merges(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))


def damage_a_merge_of_three(folder: Path) -> None:
    model = {"vocab": VOCABULARY, "merges": ["r e d</w>"]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


def damage_a_merge_of_unknown_tokens(folder: Path) -> None:
    model = {"vocab": VOCABULARY, "merges": ["red circle"]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


def damage_negative_id(folder: Path) -> None:
    model = {"vocab": VOCABULARY | {"x": -1}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


def damage_no_end_of_text(folder: Path) -> None:
    vocabulary = {token: index for token, index in VOCABULARY.items() if token != "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": MERGES}}))


def damage_another_kind(folder: Path) -> None:
    model = {"type": "WordPiece", "vocab": VOCABULARY, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


def damage_special_token_is_a_number(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"pad_token": 7}')


def damage_pad_token_is_unknown(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')


def damage_pads_left(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"padding_side": "left"}')


def damage_added_token_without_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"0": {}}}')


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("kind", [BundleError, CheckpointError])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_one_error_that_says_where_and_what_to_do(damage, kind, tmp_path):
    folder = write_tokenizer_json(tmp_path / "tokenizer")
    damage(folder)
    with pytest.raises(kind, match="tokenizer") as caught:
        Tokenizer.load(folder, damage=kind)
    assert caught.value.hint


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere.vocab\.json"):
        Tokenizer.load(tmp_path / "nowhere")


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_wrong_byte_is_a_bundle_error_or_harmless(folder, tmp_path, position, byte):
    data = bytearray((folder / "tokenizer.json").read_bytes())
    data[position % len(data)] = byte
    (tmp_path / "tokenizer.json").write_bytes(data)
    with contextlib.suppress(BundleError):
        assert Tokenizer.load(tmp_path).encode("red circle").ids.shape == (77,)
