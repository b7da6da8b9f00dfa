"""SARI: how well a text was simplified, by what was kept, deleted and added."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

__all__ = ["sari_of"]

LONGEST = 4  # words of an n-gram


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _times(counts: Counter, factor: int) -> Counter:
    return Counter({gram: factor * count for gram, count in counts.items()})


def _harmonic(precision: float, recall: float) -> float:
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0


def _sari(source: Counter, found: Counter, wanted: list[Counter]) -> np.ndarray:
    """F1 of what was kept, precision of what was deleted, F1 of what was added."""
    references = sum(wanted, Counter())
    source_r, found_r = (_times(x, len(wanted)) for x in (source, found))

    kept, may_keep = source_r & found_r, source_r & references
    right = kept & references
    precision = _mean(right[g] / kept[g] for g in kept) if kept else 1.0
    total = may_keep.total()
    recall = right.total() / total if total else 1.0
    keep = _harmonic(precision, recall)

    deleted = source_r - found_r
    right = deleted - references
    delete = _mean(right[g] / deleted[g] for g in deleted) if deleted else 1.0

    added, may_add = set(found) - set(source), set(references) - set(source)
    right = len(added & may_add)
    precision = right / len(added) if added else 1.0
    add = _harmonic(precision, right / len(may_add) if may_add else 1.0)
    return np.array([keep, delete, add])


def sari_of(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one simplification, in [0, 1].

        (F1 of kept + precision of deleted + F1 of added n-grams) / 3, mean of n = 1 … 4

    Computed as in Hugging Face's `evaluate`: 0/0 = 1, lower case, tokens of mteval-13a.
    """
    tokens = [
        Tokenizer13a()(text.lower()).split()
        for text in (source, prediction, *references)
    ]
    parts = []
    for n in range(1, LONGEST + 1):
        first, found, *wanted = (_ngrams(words, n) for words in tokens)
        parts.append(_sari(first, found, wanted))
    return float(np.mean(parts))
