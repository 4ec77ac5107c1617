"""How far two readings of the same pairs' scores agree, and where to put the second one's threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput

__all__ = ["Agreement", "compare", "spearman"]

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the pairs that both readings score: how many both let pass at one threshold, and so on.

    best_threshold: what has to be asked of the other reading to agree most often with `threshold` on
    the first; best_agreement: the share of pairs that then agree. spearman is NaN where one reading
    gives all pairs the same score.
    """

    pairs: int
    unscored: int
    threshold: float
    both_pass: int
    both_fail: int
    only_first: int
    only_second: int
    spearman: float
    best_threshold: float
    best_agreement: float

    @property
    def agreement(self) -> float:
        """The share of pairs that both let pass or both drop."""
        return (self.both_pass + self.both_fail) / self.pairs


def compare(first: Scores, second: Scores, threshold: float) -> Agreement:
    """Two readings of the same pairs, (N) each; NaN is no score. Raises InvalidInput for no pair."""
    valid = ~(np.isnan(first) | np.isnan(second))
    if not valid.any():
        raise InvalidInput("no pair has a score in both modes: there is nothing to compare")
    a, b = first[valid], second[valid]
    passes, also = a >= threshold, b >= threshold
    best, share = _best_threshold(passes, b, threshold)
    return Agreement(
        pairs=len(a),
        unscored=int((~valid).sum()),
        threshold=threshold,
        both_pass=int((passes & also).sum()),
        both_fail=int((~passes & ~also).sum()),
        only_first=int((passes & ~also).sum()),
        only_second=int((~passes & also).sum()),
        spearman=spearman(a, b),
        best_threshold=best,
        best_agreement=share,
    )


def _best_threshold(
    passes: NDArray[np.bool_], scores: Scores, threshold: float
) -> tuple[float, float]:
    """Halfway between two neighbouring scores; of equally good ones that nearest to `threshold`."""
    ordered = np.unique(scores)  # ascending
    between = (ordered[1:] + ordered[:-1]) / 2
    # Beyond the outermost scores: everything passes, or nothing does.
    candidates = np.array([threshold, 0.0, *between, min(1.0, np.nextafter(ordered[-1], 2))])
    shares = ((scores[:, None] >= candidates) == passes[:, None]).mean(0)  # (candidates)
    best = candidates[shares == shares.max()]
    return float(best[np.abs(best - threshold).argmin()]), float(shares.max())


def spearman(a: Scores, b: Scores) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant."""
    ranks = np.stack([_ranks(a), _ranks(b)])
    if not ranks.std(axis=1).all():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Scores) -> Scores:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])
