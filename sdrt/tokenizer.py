"""Text to token ids, as the CLIP tokenizer of the checkpoint defines them. Reads both layouts of its files.

A tokenizer folder holds either `tokenizer.json`, or `vocab.json` and `merges.txt`; beside them
`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` may name special tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from sdrt.bundle import JsonValue
from sdrt.errors import BundleError, CheckpointError, RequestError

Damage: TypeAlias = type[BundleError] | type[CheckpointError]
Record = TypeVar("Record")

# The order in which tokens that the vocabulary lacks get their ids.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BEGIN_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LONGEST_TEXT = 100_000  # characters; so many take 0.1 s
LARGEST_FILE_BYTES = 64 * 2**20  # CLIP's own vocabulary takes 3.6 MB
HINTS = {
    BundleError: "rebuild the bundle from its checkpoint with: sdrt build",
    CheckpointError: "download the checkpoint's tokenizer folder again",
}

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Bpe(msgspec.Struct):
    vocab: dict[str, TokenId]
    merges: list[str | tuple[str, str]]
    type: str = "BPE"


class _TokenizerFile(msgspec.Struct):
    model: _Bpe
    added_tokens: list[dict[str, Any]] = msgspec.field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """A prompt as the text encoder reads it.

    ids: int64 [max_length], read-only: begin of text, the prompt, end of text, padding.
    dropped: the end of the prompt that did not fit; "" when all of it did.
    """

    ids: npt.NDArray[np.int64]
    dropped: str


class Tokenizer:
    """The byte-pair tokenizer of one checkpoint. Immutable and safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, *, begin: int, end: int, pad: int, max_length: int) -> None:
        self._backend = backend
        self._begin = begin
        self._end = end
        self._pad = pad
        self.max_length = max_length

    @classmethod
    def load(cls, folder: Path, *, max_length: int = 77, damage: Damage = BundleError) -> Self:
        """Read a tokenizer folder; what is missing or malformed in it raises `damage`."""
        config = _read_config(folder, damage)
        file = folder / "tokenizer.json"
        parts = _read(file, _TokenizerFile, damage) if file.is_file() else _read_legacy_files(folder, damage)
        added = _added_tokens(folder, config, parts.added_tokens, damage)
        named = _named_tokens(config, added, folder, damage)
        backend = _byte_pair_encoder(parts.model, named["unk_token"].content, folder, damage)
        backend.add_tokens([*added.values(), *named.values(), *_extra_tokens(config, folder, damage)])
        known = parts.model.vocab.keys() | added.keys()
        ids = []
        for role in ("bos_token", "eos_token", "pad_token"):
            text = named[role].content
            index = backend.token_to_id(text)
            # A token that the vocabulary lacks would get an id that the text encoder has no row for.
            if text not in known or index is None:
                raise damage(f"{folder} has no token {text!r}, its {role}", hint=HINTS[damage])
            ids.append(index)
        begin, end, pad = ids
        return cls(backend, begin=begin, end=end, pad=pad, max_length=max_length)

    def encode(self, text: str) -> TokenizedText:
        """Token ids of one text, cut or padded to `max_length`.

        Raises RequestError for what is not Unicode text, and above LONGEST_TEXT characters.
        """
        if len(text) > LONGEST_TEXT:
            raise RequestError(
                f"the prompt has {len(text):,} characters, more than {LONGEST_TEXT:,}",
                hint=f"shorten it: the model reads {self.max_length - 2} tokens, about as many words",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt holds U+{ord(text[error.start]):04X} at position {error.start}, which is no character",
                hint="pass the prompt as valid Unicode text",
            ) from error
        encoding = self._backend.encode(text, add_special_tokens=False)
        room = self.max_length - 2
        kept = encoding.ids[:room]
        ids = np.full(self.max_length, self._pad, np.int64)
        ids[0] = self._begin
        ids[1 : 1 + len(kept)] = kept
        ids[1 + len(kept)] = self._end
        ids.setflags(write=False)
        dropped = text[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""
        return TokenizedText(ids=ids, dropped=dropped)


def _read(path: Path, kind: type[Record], damage: Damage) -> Record:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise damage(f"{path} has {path.stat().st_size} bytes, too many for a tokenizer", hint=HINTS[damage])
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise damage(f"{path} cannot be read: {error}", hint=HINTS[damage]) from error


def _read_legacy_files(folder: Path, damage: Damage) -> _TokenizerFile:
    vocab = _read(folder / "vocab.json", dict[str, TokenId], damage)
    path = folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise damage(f"{path} cannot be read: {error}", hint=HINTS[damage]) from error
    merges = [line.removesuffix("\r") for line in lines if line.strip() and not line.startswith("#version")]
    return _TokenizerFile(model=_Bpe(vocab=vocab, merges=list(merges)))


def _read_config(folder: Path, damage: Damage) -> dict[str, JsonValue]:
    config: dict[str, JsonValue] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        superseded = name == "special_tokens_map.json" and "added_tokens_decoder" in config
        if path.is_file() and not superseded:
            config |= _read(path, dict[str, Any], damage)
    for key in ("padding_side", "truncation_side"):
        if config.get(key, "right") != "right":
            raise damage(f"{folder} asks for {key} {config[key]!r}", hint="only CLIP's own, right, is supported")
    return config


def _added_tokens(
    folder: Path, config: Mapping[str, JsonValue], of_file: list[dict[str, JsonValue]], damage: Damage
) -> dict[str, tokenizers.AddedToken]:
    """Tokens outside the byte-pair vocabulary, by text, in the order of their ids."""
    declared = config.get("added_tokens_decoder")
    legacy = folder / "added_tokens.json"
    by_id: dict[int, tokenizers.AddedToken] = {}
    try:
        if isinstance(declared, dict):
            by_id |= {int(key): _token(value) for key, value in declared.items()}
        elif legacy.is_file():
            named = {_token(config[role]).content for role in NAMED_TOKENS if config.get(role) is not None}
            for text, index in _read(legacy, dict[str, TokenId], damage).items():
                by_id[index] = tokenizers.AddedToken(text, normalized=text not in named, special=text in named)
        if not isinstance(declared, dict):
            by_id |= {msgspec.convert(entry["id"], int): _token(entry) for entry in of_file}
    except (ValueError, TypeError, KeyError) as error:
        raise damage(f"{folder} has a malformed added token: {error}", hint=HINTS[damage]) from error
    return {by_id[index].content: by_id[index] for index in sorted(by_id)}


def _named_tokens(
    config: Mapping[str, JsonValue], added: Mapping[str, tokenizers.AddedToken], folder: Path, damage: Damage
) -> dict[str, tokenizers.AddedToken]:
    """The tokens that have a role, in the order of NAMED_TOKENS."""
    defaults = {"bos_token": BEGIN_OF_TEXT} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    named = {}
    for role in NAMED_TOKENS:
        value = config.get(role, defaults.get(role))
        if value is None and role not in defaults:
            continue
        try:
            token = _token(value)
        except (ValueError, TypeError, KeyError) as error:
            raise damage(f"{folder} has a malformed {role}: {value!r}", hint=HINTS[damage]) from error
        named[role] = added.get(token.content, token)
    return named


def _extra_tokens(config: Mapping[str, JsonValue], folder: Path, damage: Damage) -> list[tokenizers.AddedToken]:
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key)
        if isinstance(value, list):
            try:
                return [_token(entry) for entry in value]
            except (ValueError, TypeError, KeyError) as error:
                raise damage(f"{folder} has malformed {key}: {value!r}", hint=HINTS[damage]) from error
    return []


def _token(value: JsonValue) -> tokenizers.AddedToken:
    """A special token from its text, or from the object that older checkpoints describe it with."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True)
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a token")
    content = msgspec.convert(value["content"], str)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: msgspec.convert(value[name], bool) for name in names if name in value}
    return tokenizers.AddedToken(content, **({"special": True} | flags))


def _byte_pair_encoder(bpe: _Bpe, unknown: str, folder: Path, damage: Damage) -> tokenizers.Tokenizer:
    """CLIP's pipeline: NFC, one space for any whitespace, lower case, words, bytes, merges."""
    if bpe.type != "BPE":
        raise damage(f"{folder} is a {bpe.type} tokenizer", hint="only CLIP's byte-pair tokenizer is supported")
    merges: list[tuple[str, str]] = []
    for number, merge in enumerate(bpe.merges, start=1):
        first, *rest = merge.split(" ") if isinstance(merge, str) else merge
        if len(rest) != 1:
            raise damage(f"{folder} has a malformed merge, number {number}: {merge!r}", hint=HINTS[damage])
        merges.append((first, rest[0]))
    try:
        model = tokenizers.models.BPE(
            vocab=bpe.vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown
        )
    except Exception as error:  # the library raises nothing narrower for a merge of unknown tokens
        raise damage(f"{folder} has inconsistent merges: {error}", hint=HINTS[damage]) from error
    backend = tokenizers.Tokenizer(model)
    spaces = tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    lower = tokenizers.normalizers.Lowercase()
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC(), spaces, lower])
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, to_bytes])
    return backend
