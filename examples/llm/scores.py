"""Scores of generated answers: one metric a task, all of them from 0 to 1.

Each metric takes the rows and one prediction a row and gives numbers by name, of which
the first is the metric itself. Blanks around an answer never count.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import NoReturn

import numpy as np
from rapidfuzz.distance import Indel, LCSseq, Levenshtein
from sacrebleu.metrics.chrf import CHRF

from examples.llm.formats import Row
from examples.llm.sari import sari_of
from examples.streams.domains import DataError

__all__ = [
    "METRICS",
    "accuracy",
    "chrf",
    "code_similarity",
    "edit_similarity",
    "exact_match",
    "first_letter",
    "json_match",
    "number",
    "rouge_l",
    "sari",
    "score",
    "sql_match",
]

Numbers = dict[str, float]

# A number as people write it, with thousands between commas or without.
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# A letter that stands alone, after "Answer:" or at the beginning.
LETTER = re.compile(r"\W*(?:answer\W+)?([a-z])(?![a-z'])", re.IGNORECASE)
# AND outside of double quotes.
AND = re.compile(r'\s+and\s+(?=(?:[^"]*"[^"]*")*[^"]*$)')
LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _pairs(rows: Sequence[Row], predictions: Sequence[str]) -> list[tuple[str, str]]:
    """(prediction, answer), without blanks around them."""
    both = zip(predictions, rows, strict=True)
    return [(found.strip(), row.answer.strip()) for found, row in both]


def _f1(hits: float, found: float, wanted: float) -> float:
    """2 hits / (found + wanted), the harmonic mean of precision and recall; 0/0 = 1."""
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def exact_match(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Share of predictions that are the answer, character by character."""
    return {"exact_match": _mean(p == a for p, a in _pairs(rows, predictions))}


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def number(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Share of predictions whose last number equals that of the answer."""
    wanted = [_last_number(row.answer) for row in rows]
    if None in wanted:
        _reject(rows[wanted.index(None)], "a number")
    found = (_last_number(prediction) for prediction in predictions)
    return {"number": _mean(p == a for p, a in zip(found, wanted, strict=True))}


def _first_letter(text: str) -> str | None:
    found = LETTER.match(text)
    return found.group(1).upper() if found else None


def first_letter(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Share of predictions that begin with the answer's letter, as a choice is named.

    It may come after "Answer:". TRACE's own code takes the first character whatever
    follows, so that "Because" counts as B; here it is no letter.
    """
    wanted = [_first_letter(row.answer) for row in rows]
    if None in wanted:
        _reject(rows[wanted.index(None)], "a letter such as A, or Answer: A")
    found = (_first_letter(prediction) for prediction in predictions)
    return {"first_letter": _mean(p == a for p, a in zip(found, wanted, strict=True))}


def accuracy(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Share of right labels, and the mean over the labels of their F1.

        F1 of a label = 2 hits / (times predicted + times right)

    The mean is over the labels that occur among the answers, equally weighted.
    """
    pairs = _pairs(rows, predictions)
    found, wanted = (Counter(column) for column in zip(*pairs, strict=True))
    hits = Counter(a for p, a in pairs if p == a)
    return {
        "accuracy": _mean(p == a for p, a in pairs),
        "macro_f1": _mean(_f1(hits[c], found[c], wanted[c]) for c in wanted),
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def rouge_l(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """ROUGE-L: mean F1 of the longest common subsequence of words.

        2 |LCS| / (|prediction| + |answer|)

    Words are runs of letters and digits of any script in lower case, unstemmed; a pair
    without words scores 1 where it is equal.
    """

    def one(pair):
        p, a = map(_words, pair)
        common = LCSseq.similarity(p, a)
        return _f1(common, len(p), len(a)) if p or a else pair[0] == pair[1]

    return {"rouge_l": _mean(map(one, _pairs(rows, predictions)))}


def edit_similarity(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Mean of 1 − Levenshtein distance / length of the longer one; and exact match."""
    pairs = _pairs(rows, predictions)
    similarity = (Levenshtein.normalized_similarity(p, a) for p, a in pairs)
    return {"edit_similarity": _mean(similarity)} | exact_match(rows, predictions)


def _plain_code(text: str) -> str:
    """Py150 writes a literal as <NUM_LIT:2>, and as <NUM_LIT> where it was masked."""
    text = LITERAL.sub(r"\1", text).replace("<NUM_LIT>", "0")
    return text.replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")


def code_similarity(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Mean of 1 − insertions and deletions / length of both, as TRACE scores Py150.

    This is `fuzz.ratio`, which counts a replaced character twice and which TRACE rounds
    to whole per cents. Masked literals are unmasked first.
    """
    pairs = _pairs(rows, predictions)
    plain = ((_plain_code(p), _plain_code(a)) for p, a in pairs)
    similarity = (Indel.normalized_similarity(p, a) for p, a in plain)
    return {"code_similarity": _mean(similarity)}


def chrf(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """chrF2 of the whole corpus by sacrebleu, over 100; and edit similarity."""
    found, wanted = zip(*_pairs(rows, predictions), strict=True)
    whole = CHRF().corpus_score(found, [wanted]).score / 100
    return {"chrf": float(whole)} | edit_similarity(rows, predictions)


def sari(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """SARI with the whole prompt as the source, as TRACE scores 20Minuten."""
    pairs = _pairs(rows, predictions)
    both = zip(rows, pairs, strict=True)
    return {"sari": _mean(sari_of(row.prompt, p, [a]) for row, (p, a) in both)}


def _slots(text: str) -> set[tuple[str, str]] | None:
    """Keys and values of a JSON object; None where the text is none."""
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            return {(k, json.dumps(v, sort_keys=True)) for k, v in content.items()}
    except (ValueError, RecursionError):
        pass
    return None


def _intent(slots: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {slot for slot in slots if slot[0] == "intent"}


def json_match(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Share of equal JSON objects, of right intents, and F1 over all slots and values.

    The intent is the value of "intent", the other keys are slots. What is no JSON
    object is wrong and has no slots. F1 is 1 where nobody has a slot.
    """
    equal, intents, hits, given, right = [], [], 0, 0, 0
    for row, prediction in zip(rows, predictions, strict=True):
        found, wanted = _slots(prediction), _slots(row.answer)
        if wanted is None:
            _reject(row, "a JSON object")
        equal.append(found == wanted)
        intents.append(found is not None and _intent(found) == _intent(wanted))
        found, wanted = (x - _intent(x) for x in (found or set(), wanted))
        hits += len(found & wanted)
        given += len(found)
        right += len(wanted)
    return {
        "json_match": _mean(equal),
        "intent_accuracy": _mean(intents),
        "slot_f1": _f1(hits, given, right),
    }


def _query(text: str) -> tuple[str, list[str]]:
    before, _, where = text.lower().strip("; \n").partition(" where ")
    return before, sorted(AND.split(where))


def sql_match(rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """Share of equal queries in lower case, with the conditions after WHERE sorted."""
    pairs = _pairs(rows, predictions)
    return {"sql_match": _mean(_query(p) == _query(a) for p, a in pairs)}


def _reject(row: Row, expected: str) -> NoReturn:
    raise DataError(
        f"metric: the answer {row.answer!r:.80} (its prompt begins "
        f"{row.prompt[:40]!r}) cannot be scored, expected {expected}."
    )


METRICS: dict[str, Callable[[Sequence[Row], Sequence[str]], Numbers]] = {
    "exact_match": exact_match,
    "number": number,
    "first_letter": first_letter,
    "accuracy": accuracy,
    "rouge_l": rouge_l,
    "sari": sari,
    "edit_similarity": edit_similarity,
    "code_similarity": code_similarity,
    "chrf": chrf,
    "json": json_match,
    "sql": sql_match,
}


def score(metric: str, rows: Sequence[Row], predictions: Sequence[str]) -> Numbers:
    """The numbers of a task's metric, the first of which is the metric itself.

    Args:
      metric: a name in `METRICS`.
      rows: those that were answered.
      predictions: one a row, without the end of text.

    Raises:
      ValueError: for an unknown metric, no rows, or another number of predictions.
      DataError: for an answer that this metric cannot score.
    """
    if metric not in METRICS:
        raise ValueError(
            f"metric: got {metric!r}, expected one of {', '.join(METRICS)}."
        )
    if not rows or len(rows) != len(predictions):
        raise ValueError(
            f"predictions: got {len(predictions)} for {len(rows)} rows, expected one "
            "for each of at least one row."
        )
    return METRICS[metric](rows, predictions)
