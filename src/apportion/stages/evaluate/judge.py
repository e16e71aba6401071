"""An independent judge of sentiment for evaluation: word counts, no neural network, trained on separate texts.

A policy is optimised for its reward model, whose score is therefore no evidence of better text. The judge is
independent of it: other texts (part "judge" of `data.splits`), other features, another kind of model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from apportion.data import labelled
from apportion.errors import DataError, ModelError
from apportion.intervals import proportion

# Chosen on a tenth of the part "judge", held out: mean log loss on excerpts of 20, 30 and 60 words. 0.500 for these;
# 0.507 with C=1; 0.502 without ! and ?, then 0.505 with 16 excerpts; 0.511 with C=1 and words of two letters or more.
# Excerpts of one review are not independent, so such differences hardly matter: none of these settings is critical.
_TOKENS = r"(?u)\w[\w']*|[!?]"
_EXCERPTS_PER_TEXT = 8
_EXCERPT_WORDS = (10, 60)
_MIN_TEXTS = 3
_C = 3.0


class Judge:
    """Tf-idf of words and word pairs, and a logistic regression, fitted to full texts and to excerpts of them."""

    def __init__(self) -> None:
        self._features = None
        self._classifier = None
        self.prior = math.nan

    def fit(self, texts: Sequence[str], labels: Sequence[int], seed: int = 0) -> Judge:
        """Fit to N texts with labels 0 or 1, and to 8 random excerpts of 10 to 60 words of each; return self.

        `prior` becomes the share of positive texts.

        Raises:
            DataError: texts and labels that differ in number, a label other than 0 and 1, only one of the two labels,
                or texts that share no words.
        """
        _check(texts, labels)
        if len(set(labels)) < 2:
            got = f"{len(labels)} labels, all {labels[0] if len(labels) else None}"
            raise DataError("Judge.fit labels", got, "both 0 and 1", "Give texts of both kinds.")
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        excerpts = word_excerpts(list(texts) * _EXCERPTS_PER_TEXT, *_EXCERPT_WORDS, seed=seed)
        every_label = np.tile(np.asarray(labels), 1 + _EXCERPTS_PER_TEXT)
        features = TfidfVectorizer(
            token_pattern=_TOKENS, ngram_range=(1, 2), sublinear_tf=True, min_df=_MIN_TEXTS, dtype=np.float32
        )
        try:
            matrix = features.fit_transform([*texts, *excerpts])
        except ValueError as error:  # "empty vocabulary", "no terms remain"
            got, expected = f"{len(texts)} texts: {error}", f"words that stand in {_MIN_TEXTS} texts or more"
            raise DataError("Judge.fit texts", got, expected, "Give more texts.") from error
        self._classifier = LogisticRegression(C=_C, max_iter=500, random_state=seed).fit(matrix, every_label)
        self._features = features
        self.prior = float(np.mean(labels))
        return self

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probability (N,) float64 that each text is positive; `prior` for a text without known words.

        Raises:
            ModelError: the judge has not been fitted.
        """
        if self._features is None or self._classifier is None:
            raise ModelError("Judge", "not fitted", "a fitted judge", "Call `fit` or use `fit_judge()`.")
        if len(texts) == 0:
            return np.zeros(0)
        matrix = self._features.transform(texts)
        positive = self._classifier.predict_proba(matrix)[:, 1].astype(np.float64)
        return np.where(matrix.getnnz(axis=1) == 0, self.prior, positive)

    def accuracy(self, texts: Sequence[str], labels: Sequence[int]) -> dict[str, float]:
        """Return the accuracy on these texts: mean, and low and high of its 95 % Wilson interval.

        Raises:
            DataError: no texts, texts and labels that differ in number, or a label other than 0 and 1.
        """
        _check(texts, labels)
        correct = (self.probability(texts) >= 0.5) == (np.asarray(labels) == 1)
        return proportion(int(correct.sum()), len(texts))


def fit_judge(source: str = "imdb", *, seed: int = 0, field: str = "judge") -> Judge:
    """Return a judge fitted to the part "judge" of the labelled texts in `source` (IMDb: about 8 s).

    Raises:
        DataError: see `data.labelled` and `Judge.fit`.
    """
    rows = labelled(source, "judge", field=field)
    return Judge().fit([row.text for row in rows], [row.label for row in rows], seed)


def word_excerpts(texts: Sequence[str], shortest: int, longest: int, *, seed: int) -> list[str]:
    """Return one random run of `shortest` to `longest` words of each text; a shorter text is returned in full."""
    rng = random.Random(seed)
    excerpts = []
    for text in texts:
        words = text.split()
        length = min(len(words), rng.randint(shortest, longest))
        start = rng.randint(0, len(words) - length)
        excerpts.append(" ".join(words[start : start + length]))
    return excerpts


def _check(texts: Sequence[str], labels: Sequence[int]) -> None:
    if len(texts) != len(labels) or len(texts) == 0:
        got = f"{len(texts)} texts and {len(labels)} labels"
        raise DataError("Judge", got, "one label for each of at least one text", "Pass lists that match.")
    invalid = next((label for label in labels if label not in (0, 1)), None)
    if invalid is not None:
        raise DataError("Judge labels", invalid, "0 or 1", "Give 1 for positive, 0 for negative.")
