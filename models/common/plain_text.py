"""Encode a user's words as plain text: the name of a token within them is mere letters, never that token."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Frame(NamedTuple):
    """What stands around a user's words in a template."""

    head: list[int]  # up to the last named token before them
    lead: str  # from there to the words
    trail: str  # from the words to the next named token
    tail: list[int]


class PlainText:
    """Text as ids of a tokenizer. `<I5>` or `<|im_end|>` in a caption are seven or more letters, so that nobody can end
    a turn or draw from inside a caption."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids_of_names = tokenizer.get_added_vocab()  # built anew at every call, of 65,000 names
        self._named = set(self.ids_of_names.values())

    def ids(self, text: str) -> list[int]:
        """Return the tokenizer's own ids, names of tokens included."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def named_spans(self, text: str) -> list[tuple[int, int]]:
        """Find where the tokenizer would see a named token in a text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [span for id_, span in pairs if id_ in self._named]

    def plain(self, text: str) -> list[int]:
        """Return ids of a text in which names of tokens are mere letters; other texts' are the tokenizer's own."""
        ids = self.ids(text)
        if self._named.isdisjoint(ids):
            return ids
        cuts = {start + 1 if end - start > 1 else end for start, end in self.named_spans(text)} - {len(text)}
        if not cuts:
            return ids
        return [
            id_ for part in pairwise([0, *sorted(cuts), len(text)]) for id_ in self.plain(text[slice(*part)])
        ]

    def frame(self, before: str, after: str) -> Frame:
        """Cut parts of a template where named tokens are: between them text is encoded as one piece, so a user's words
        must be joined to what touches them."""
        first = max((end for _, end in self.named_spans(before)), default=0)
        last = min((start for start, _ in self.named_spans(after)), default=len(after))
        return Frame(self.ids(before[:first]), before[first:], after[:last], self.ids(after[last:]))

    def framed(self, frame: Frame, words: str) -> list[int]:
        """Return ids of words between parts of a template, whose named tokens are tokens."""
        return [*frame.head, *self.plain(frame.lead + words + frame.trail), *frame.tail]
