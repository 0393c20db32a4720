"""Fixtures of nearest-neighbour classification."""

from pathlib import Path

import numpy as np

from eupe_jax.evals import knn
from tests.golden_kinds.common import Fixture


def check_knn(path: Path) -> None:
    """Votes, predictions and accuracies of every case, blocks cut so that several are merged."""
    fixture = Fixture(path)
    meta = fixture.meta
    for case in meta["cases"]:
        name, classes = case["name"], case["classes"]
        train, test = fixture.inputs[f"{name}/train"], fixture.inputs[f"{name}/test"]
        train_labels, labels = fixture.inputs[f"{name}/train_labels"], fixture.inputs[f"{name}/test_labels"]
        settings = knn.Settings(
            ks=tuple(meta["ks"]),
            reported_k=meta["ks"][0],
            temperature=meta["temperature"],
            leave_one_out=case.get("skip_first", False),
            train_block=len(train) // 3 + 1,
            query_block=len(test) // 2 + 1,
        )
        similarity, index = knn.neighbours(train, test, settings)
        votes = knn.vote(similarity, train_labels[index], classes, settings)
        ranked, _, _ = knn.classify(train, train_labels, test, classes, settings)
        fixture.check(f"{name}/ks", list(votes), 0.0)
        fixture.check(f"{name}/min_gap_at_k", _gaps(train, test, list(votes)), 1e-6)
        for k in votes:
            out = f"{name}/k{k}"
            fixture.check(f"{out}/probs", votes[k], 1e-5)
            fixture.check(f"{out}/pred", ranked[k][:, 0], 0.0)
            found = knn.shared.accuracies(ranked[k], labels)
            for theirs, ours in (("top-1", "top1"), ("top-5", "top5")):
                if f"{out}/{theirs}" in fixture.outputs:
                    fixture.check(f"{out}/{theirs}", np.float32(found[ours]), 1e-7)
    fixture.assert_all_checked()


def _gaps(train: np.ndarray, test: np.ndarray, ks: list[int]) -> list[float]:
    """Smallest gap between the k-th and the next similarity (nothing skipped) over the test rows; 1 without a next."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.astype(np.float64), test.astype(np.float64))]
    ordered = -np.sort(-(unit[1] @ unit[0].T), axis=1)
    return [1.0 if k == ordered.shape[1] else float((ordered[:, k - 1] - ordered[:, k]).min()) for k in ks]


KINDS = {"knn": check_knn}
