"""CLIP's tokeniser, with the vocabulary from the user's own files.

UVA tokenises with `AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")`. The rules, which
all CLIP models share, are coded here, so that only words and merges are read from files. Nothing is
downloaded: the user names the files, or they are in the cache of transformers and huggingface_hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uva_jax.runtime.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 30  # tokens to which UVA pads a sentence; longer ones are not truncated
# Contractions, runs of letters, single digits, and runs of other characters except spaces.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_CACHED = "models--openai--clip-vit-*/snapshots/*"  # all share one vocabulary
_HOW = (
    "run AutoTokenizer.from_pretrained('openai/clip-vit-base-patch32') of transformers once on a "
    "machine with a network, or copy the files from there and name their folder with "
    "config.data.vocabulary, or read language latents from a file with config.data.language"
)


class ClipTokenizer:
    """Turns sentences into token numbers as UVA does."""

    def __init__(self, words: dict[str, int], merges: Sequence[tuple[str, str]], source: str):
        """Builds the tokeniser.

        Args:
          words: number of each word.
          merges: pairs of words that become one, in order of precedence.
          source: origin of words and merges, for error messages.

        Raises:
          UserError: words and merges do not fit, or the library `tokenizers` is not installed.
        """
        _check(words, merges, source)
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                "tokenising sentences needs the library tokenizers: install it with "
                "pip install 'uva_jax[language]'"
            ) from error
        from tokenizers import normalizers, pre_tokenizers

        self.source, self.size = source, max(words.values()) + 1
        self.start, self.end = words[START], words[END]
        model = tokenizers.models.BPE(
            vocab=words, merges=list(merges), end_of_word_suffix="</w>", unk_token=END
        )
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.add_special_tokens([START, END])

    @classmethod
    def load(cls, vocabulary: str | os.PathLike = "") -> ClipTokenizer:
        """Loads the tokeniser with the vocabulary of a folder.

        Args:
          vocabulary: a folder with vocab.json and merges.txt, or with tokenizer.json; "": the
            cache of transformers.

        Raises:
          UserError: there is no vocabulary, or it is damaged.
        """
        folder = _find(vocabulary)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            words, path = _read_json(folder / "vocab.json"), folder / "merges.txt"
            lines = _read(path).split("\n")
            merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
        else:
            path = folder / "tokenizer.json"
            model = _read_json(path).get("model")
            if not isinstance(model, dict):
                raise UserError(f"{path} is not a tokeniser, it holds no model: take a fresh copy")
            words, merges = model.get("vocab"), model.get("merges")
        return cls(words, _pairs(merges, path), str(folder))

    def __call__(
        self, sentences: Sequence[str], length: int = LENGTH
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns token numbers and mask of n sentences, both (n, tokens) int32.

        Each sentence has a start and an end token and is padded with end tokens, whose mask is 0,
        to the larger of `length` and the tokens of the longest sentence.
        """
        rows = [
            [self.start, *encoding.ids, self.end]
            for encoding in self._tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        ]
        length = max([length, *map(len, rows)])
        tokens = np.full((len(rows), length), self.end, np.int32)
        mask = np.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        return tokens, mask


def _holds_vocabulary(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def _find(vocabulary: str | os.PathLike) -> Path:
    wanted = "CLIP's vocabulary (vocab.json and merges.txt, or tokenizer.json)"
    if vocabulary:
        named = Path(vocabulary).expanduser()
        folder = named.parent if named.is_file() else named
        if _holds_vocabulary(folder):
            return folder
        there = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        found = f"it holds only {', '.join(there) or 'nothing'}" if folder.is_dir() else "not there"
        raise UserError(f"there is no {wanted} in {folder} ({found}): {_HOW}")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    for folder in sorted(hub.glob(_CACHED)):
        if _holds_vocabulary(folder):
            return folder
    raise UserError(f"there is no {wanted} in {hub / _CACHED}: {_HOW}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): take a fresh copy") from error


def _read_json(path: Path) -> dict:
    text = _read(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): take a fresh copy") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold a JSON object: take a fresh copy")
    return found


def _pairs(merges: object, path: Path) -> list[tuple[str, str]]:
    """Returns merges as pairs; files hold "a b" or, in newer tokenizer.json, ["a", "b"]."""
    if not isinstance(merges, list):
        raise UserError(f"{path} holds no merges: it is not a vocabulary of CLIP")
    pairs = [tuple(m.split()) if isinstance(m, str) else m for m in merges]
    for i, pair in enumerate(pairs):
        parts = isinstance(pair, list | tuple) and len(pair) == 2
        if not parts or not all(isinstance(word, str) for word in pair):
            raise UserError(f"{path}: merge {i} is {merges[i]!r:.80}, not two words: it is damaged")
    return [tuple(pair) for pair in pairs]


def _check(words: object, merges: Sequence[tuple[str, str]], source: str) -> None:
    if not isinstance(words, dict):
        raise UserError(f"{source}: the vocabulary does not map words to numbers: it is damaged")
    numbers = list(words.values())
    if any(type(n) is not int or not 0 <= n < 1 << 31 for n in numbers):
        raise UserError(
            f"{source}: a number in the vocabulary is not a whole number from 0: it is damaged"
        )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"{source}: two words in the vocabulary share a number: it is damaged")
    if missing := [word for word in (START, END) if word not in words]:
        raise UserError(f"{source}: the vocabulary lacks {' and '.join(missing)}: it is not CLIP's")
    for pair in merges:
        if unknown := [word for word in (*pair, "".join(pair)) if word not in words]:
            raise UserError(
                f"{source}: the merge of {pair[0]!r} and {pair[1]!r} needs the word "
                f"{unknown[0]!r}, which the vocabulary lacks: the files do not belong together"
            )
