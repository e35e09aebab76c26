"""Which tokens hold which characters of a text, and whether these tokens, decoded, are these characters.

A token that holds a character of a span belongs to it, with whatever else it holds: nothing of an answer is lost, and
at each end of it at most the rest of one token is trained beside it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from deca_ds.errors import DataError

Spans = Sequence[tuple[int, int]]  # of characters, or of tokens: first, and the one after the last; ascending
_PROBE = "A b\n\n c: 1,234 "


class Spanning:
    """Tokenises texts, without special tokens around them, and finds the tokens of spans of characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.backend = tokenizer, _plain_backend(tokenizer)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if self.backend is not None:
            return [one.ids for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return ids

    def encode(
        self, texts: Sequence[str], spans: Sequence[Spans], places: Sequence[str]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return (ids, spans of tokens) of each text. Raises DataError that names the place where they do not decode to
        it."""
        made = self._fast(texts, spans) if self.backend is not None else self._slow(texts, spans)
        read = iter(self._decode([ids[first:end] for ids, found, _ in made for first, end in found]))
        for (_, found, written), place in zip(made, places, strict=True):
            for _, one in zip(found, written, strict=True):
                self._check(one, next(read), place)
        return [(ids, found) for ids, found, _ in made]

    def _fast(self, texts: Sequence[str], spans: Sequence[Spans]) -> list[_Found]:
        assert self.backend is not None
        made = []
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for text, of_text, encoding in zip(texts, spans, encodings, strict=True):
            offsets = encoding.offsets
            found, written = [], []
            for begin, stop in of_text:
                first, end = bisect_left(offsets, (begin,)), bisect_left(offsets, (stop,))
                while first > 0 and offsets[first - 1][1] > begin:
                    first -= 1
                found.append((first, end))
                if first < end:  # with the rest of the tokens at both ends
                    begin, stop = min(begin, offsets[first][0]), max(stop, offsets[end - 1][1])
                written.append(text[begin:stop])
            made.append((encoding.ids, found, written))
        return made

    def _slow(self, texts: Sequence[str], spans: Sequence[Spans]) -> list[_Found]:
        """Encode with a tokenizer that gives no offsets: the tokens up to a border are those that the text up to there
        has on its own."""
        made = []
        for text, of_text in zip(texts, spans, strict=True):
            ids, *parts = self.tokens([text, *(text[:border] for span in of_text for border in span)])
            shared = [_common(part, ids) for part in parts]
            found, written = [], []
            for (begin, stop), first, end in zip(of_text, shared[::2], shared[1::2], strict=True):
                wanted, read = _visible(text[begin:stop]), _visible(self._decode([ids[first:end]])[0])
                while wanted not in read and end < len(ids):  # a token continues beyond the border
                    end += 1
                    read = _visible(self._decode([ids[first:end]])[0])
                    if len(read) > len(wanted) + _LONGEST:
                        break
                found.append((first, end))
                written.append(read if wanted in read else text[begin:stop])
            made.append((ids, found, written))
        return made

    def _check(self, written: str, read: str, place: str) -> None:
        if written == read or _visible(written) == _visible(read):
            return
        # Some tokenizers do not keep every character; what they make of the text on its own is the measure then.
        again = self._decode(self.tokens([written]))[0]
        if _visible(again) != _visible(read):
            raise DataError(
                f"the tokens that would be trained are {read[:80]!r}, where the text has {written[:80]!r}",
                where=place,
                fix="use another tokenizer, or remove the row",
            )

    def _decode(self, pieces: list[list[int]]) -> list[str]:
        if self.backend is not None:
            return self.backend.decode_batch(pieces, skip_special_tokens=False)
        return [cast(str, self.tokenizer.decode(ids, skip_special_tokens=False)) for ids in pieces]


_Found = tuple[list[int], list[tuple[int, int]], list[str]]  # ids, spans of tokens, the text that each should be
_LONGEST = 100  # characters of a token


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the backend without its post-processor, which may trim offsets; None if the backend alone does not make
    the tokenizer's tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    plain = Tokenizer.from_str(backend.to_str())
    plain.post_processor = None
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = tokenizer.split_special_tokens  # which a backend's description leaves out
    same = plain.encode(_PROBE, add_special_tokens=False).ids == tokenizer(_PROBE, add_special_tokens=False).input_ids
    return plain if same else None


def _visible(text: str) -> str:
    return "".join(text.split())


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
