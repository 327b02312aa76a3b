"""Tokenizers of one file, parsed once: 1.8 MB take 40 ms, and many tests load a processor or two."""

import hashlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


class ParsedOnce:
    """`tokenizers.Tokenizer` as transformers uses it, but for `from_file`: it gives copies of what was parsed before,
    which share the vocabulary and nothing that can be changed."""

    def __init__(self) -> None:
        self._parsed: dict[bytes, Tokenizer | None] = {}  # None: such a file has what `copy` does not know

    def __call__(self, *arguments: Any) -> Tokenizer:
        return Tokenizer(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(Tokenizer, name)

    def from_file(self, path: str) -> Tokenizer:
        digest = hashlib.sha1(Path(path).read_bytes()).digest()
        if digest not in self._parsed:
            parsed = Tokenizer.from_file(path)
            self._parsed[digest] = parsed if copy(parsed).to_str() == parsed.to_str() else None
        parsed = self._parsed[digest]
        return Tokenizer.from_file(path) if parsed is None else copy(parsed)


def copy(tokenizer: Tokenizer) -> Tokenizer:
    copied = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(copied, part, getattr(tokenizer, part))
    added = tokenizer.get_added_tokens_decoder()
    copied.add_tokens([added[number] for number in sorted(added)])
    return copied
