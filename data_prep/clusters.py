"""python -m data_prep.clusters DOMAIN [--run RUN] [--largest 4] > clusters.yaml

Proposes clusters of classes that the base model confuses, for a person to edit and paste into the
domain file: YAML on stdout; on stderr how it agrees with the domain file's own clusters. data_prep
has measured the confusions on train and validation; pictures of them are in its report.html.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.cluster.hierarchy import linkage, to_tree
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import pair_confusion_matrix

from data_prep.quality import out_of_fold_probabilities
from nicheclip.domain import Domain
from nicheclip.files import read_json

# Classes are joined while the mean confusion between them is above both. Clusters of 25 styles made
# from half of the photos held 33 % of the wrong answers on the other half at 2 (with 25 of the 300
# pairs), hardly more at 1 (34 %, 27), much less at 3 (21 %, 13).
TIMES_MEAN = 2.0  # the mean of all pairs
LEAST_CONFUSION = 0.01  # where one image in a hundred is mistaken, there is little to learn from
LARGEST = 4  # classes of a cluster
SHOWN_PAIRS = 12
SHOWN_IMAGES = 3  # for each direction of a pair


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    about = __doc__.split("\n", 1)[1]
    parser = argparse.ArgumentParser(prog="python -m data_prep.clusters", description=about)
    parser.add_argument("domain", help="a domain file, or the folder that holds it as domain.yaml")
    parser.add_argument("--run", type=Path, help="a prepared run (default: runs/<domain name>)")
    parser.add_argument("--largest", type=int, default=LARGEST, help="classes of a cluster at most")
    args = parser.parse_args(arguments)
    try:
        domain = Domain.load(args.domain)
        run = args.run or Path("runs") / domain.name
        remedy = f"run `python -m data_prep {args.domain} --run {run}` first"
        report = read_json(run / "data" / "report.json", remedy, ["classes", "confusions"])
        if [entry["name"] for entry in report["classes"]] != domain.class_names:
            raise ValueError(f"'{run}' was prepared for other classes; {remedy}")
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep.clusters: {error}")
    confusions = report["confusions"]
    proposed = propose(domain.class_names, squareform(confusions["affinity"]), args.largest)
    images = confusions["train"] + confusions["validation"]
    print(f"# proposed from {images} train and validation images: edit the clusters, and name them")
    if len(proposed) == len(domain.class_names):
        print("# no pair stands out: leave clusters out, and all classes are in one")
    options: dict[str, Any] = {"default_flow_style": None, "sort_keys": False, "width": 10**6}
    print(yaml.safe_dump({"clusters": proposed}, allow_unicode=True, **options))
    print(agreement(domain, proposed), file=sys.stderr)
    print(f"look at {run / 'data' / 'report.html'}, edit the clusters, paste them", file=sys.stderr)


def measure(
    domain: Domain,
    kept: pd.DataFrame,
    image_embeds: np.ndarray,
    zero_shot: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:
    """What a linear probe and zero-shot confuse in train and validation, or in all folds.

    Args:
        kept: source_id, label, split and group_id of the images that are used; the index is their
            row in the next two.
        image_embeds: (N, D) of unit length.
        zero_shot: (N, C) probabilities.

    Returns:
        train, validation: how many images were looked at; affinity: (C (C - 1) / 2,) of each pair
        of classes, the mean probability that one gets for images of the other; pairs: the highest
        ones in both directions, with the train images that the probe takes for the other class.
    """
    used = kept[~kept.split.isin(["calibration", "test"])]
    in_train = (used.split != "validation").to_numpy()
    labels, names = domain.indices(used.label), domain.class_names
    probe = out_of_fold_probabilities(
        image_embeds[used.index], labels, used.group_id.to_numpy(), len(names), seed
    )  # (M, C)
    by_probe = soft_confusion(probe, labels)
    by_zero_shot = soft_confusion(zero_shot[used.index], labels)
    affinity = ((by_probe + by_zero_shot) + (by_probe + by_zero_shot).T) / 4
    ranked = sorted(combinations(range(len(names)), 2), key=affinity.__getitem__, reverse=True)
    pairs = []
    for label, other in (way for a, b in ranked[:SHOWN_PAIRS] for way in ((a, b), (b, a))):
        own = np.flatnonzero(in_train & (labels == label))
        mistaken = own[probe[own].argmax(axis=1) == other]
        surest = mistaken[np.argsort(-probe[mistaken, other], kind="stable")][:SHOWN_IMAGES]
        shown, chances = used[["source_id"]].iloc[surest], probe[surest, other].round(4)
        pairs.append(
            {
                "label": names[label],
                "other": names[other],
                "probe": round(by_probe[label, other], 4),
                "zero_shot": round(by_zero_shot[label, other], 4),
                "images": len(own),
                "mistaken": len(mistaken),
                "surest": shown.assign(probability=chances).to_dict("records"),
            }
        )
    return {
        "train": int(in_train.sum()),
        "validation": int((~in_train).sum()),
        "affinity": squareform(affinity).round(5).tolist(),
        "pairs": pairs,
    }


def soft_confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean probability that the images of one class give to another, however many they are.

    Few images say more with probabilities than with counts of wrong answers: clusters of 25 styles
    made from half of the photos held 33.4 % of those on the other half, and with counts 31.3 %.

    Probabilities (N, C), labels (N,) int -> (C, C), row: the label; the diagonal is 0.
    """
    sums = np.zeros((probabilities.shape[1], probabilities.shape[1]))
    np.add.at(sums, labels, probabilities)
    np.fill_diagonal(sums, 0)
    return sums / np.maximum(np.bincount(labels, minlength=len(sums)), 1)[:, None]


def propose(names: list[str], affinity: np.ndarray, largest: int = LARGEST) -> dict[str, list[str]]:
    """Average linkage, cut where a cluster would be too large or its parts too little confused.

    Of names (C) and affinity (C, C) symmetric, the members of c1, c2, ...; classes that are
    confused with nothing come last, each alone.
    """
    pairs = squareform(affinity, checks=False)  # (C (C - 1) / 2,)
    least = max(TIMES_MEAN * pairs.mean(), LEAST_CONFUSION)
    # A distance linear in the affinity, so that the height of a node is the mean confusion between
    # its parts.
    found, waiting = [], [to_tree(linkage(pairs.max() - pairs, "average"))]
    while waiting:
        node = waiting.pop()
        if node.is_leaf() or (node.count <= largest and pairs.max() - node.dist > least):
            found.append(sorted(node.pre_order()))
        else:
            waiting += [node.left, node.right]
    found.sort(key=lambda members: (len(members) == 1, members))
    return {f"c{n}": [names[index] for index in members] for n, members in enumerate(found, 1)}


def agreement(domain: Domain, proposed: dict[str, list[str]]) -> str:
    """How many pairs share a cluster in the domain file, in the proposal, and in both."""
    if len(domain.clusters) < 2:
        return "The domain file has no clusters of its own: all classes are in one."
    homes = {name: cluster for cluster, members in proposed.items() for name in members}
    ours, own = [homes[name] for name in domain.class_names], domain.class_clusters
    (_, only_ours), (only_own, both) = pair_confusion_matrix(own, ours) // 2
    return (
        f"{both} of the domain file's {both + only_own} pairs are among the proposal's "
        f"{both + only_ours}; adjusted Rand index {adjusted_rand_score(own, ours):.2f} (1: the "
        "same clusters, 0: alike as by chance)."
    )


if __name__ == "__main__":
    main()
