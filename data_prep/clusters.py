"""python -m data_prep.clusters DOMAIN [--run RUN] [--largest 4] > clusters.yaml

Proposes clusters of classes that the base model confuses, for a person to edit and paste into the
domain file: YAML on stdout; on stderr how it agrees with the domain file's own clusters, and the
most confused pairs; pictures of them in RUN/clusters.html. Looks at the train and validation images
of a prepared run, and at no others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from scipy.cluster.hierarchy import linkage, to_tree
from scipy.spatial.distance import squareform
from scipy.special import softmax
from sklearn.metrics import adjusted_rand_score

from data_prep.encode import encode_rows
from data_prep.quality import out_of_fold_probabilities
from data_prep.report import ENVIRONMENT
from nicheclip.clip import encode_texts, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import format_table
from nicheclip.files import quiet_datasets, read_json
from nicheclip.publishing.pages import Thumbnails

# Classes are joined while the mean confusion between them is above both. Clusters of 25 styles made
# from half of the photos held 33 % of the wrong answers on the other half at 2 (with 25 of the 300
# pairs), hardly more at 1 (34 %, 27), much less at 3 (21 %, 13).
TIMES_MEAN = 2.0  # the mean of all pairs
LEAST_CONFUSION = 0.01  # where one image in a hundred is mistaken, there is little to learn from
SHOWN_PAIRS = 12
SHOWN_IMAGES = 4  # for each direction of a pair


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.clusters", description=__doc__.split("\n", 1)[1]
    )
    parser.add_argument("domain", help="a domain file, or the folder that holds it as domain.yaml")
    parser.add_argument(
        "--run", type=Path, help="where the prepared run lives (default: runs/<domain name>)"
    )
    parser.add_argument(
        "--largest", type=int, default=4, help="how many classes a cluster has at most (default: 4)"
    )
    args = parser.parse_args(arguments)
    try:
        domain = Domain.load(args.domain)
        run = args.run or Path("runs") / domain.name
        evidence = gather(domain, run)
        members = propose(evidence.affinity, args.largest)
        proposed = {
            f"c{n}": [domain.class_names[index] for index in own]
            for n, own in enumerate(members, start=1)
        }
        findings = compare(domain, evidence, proposed)
        write_page(run / "clusters.html", domain, evidence, findings)
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep.clusters: {error}")
    print(to_yaml(domain, evidence, proposed))
    print(
        f"\n{summary(findings)}\n\nlook at {run / 'clusters.html'}, edit the clusters, paste them",
        file=sys.stderr,
    )


@dataclass(frozen=True)
class Evidence:
    """What two classifiers on the base's image_embeds make of the train and validation images."""

    rows: datasets.Dataset  # N prepared images, those of train first
    train_size: int
    labels: np.ndarray  # (N,) int
    probe: np.ndarray  # (N, C) probabilities of a linear probe that has not seen the image
    # of the probe and zero-shot, each (C, C) as soft_confusion gives it
    confusions: dict[str, np.ndarray]
    base: str

    @property
    def affinity(self) -> np.ndarray:
        """(C, C) symmetric: the mean of both confusions in both directions."""
        return sum((confusion + confusion.T) / 2 for confusion in self.confusions.values()) / len(
            self.confusions
        )

    def percentages(self, a: int, b: int) -> dict[str, str]:
        """How much two classes are confused, the mean of both directions, by the name of the classifier."""
        return {
            name: percent((both[a, b] + both[b, a]) / 2) for name, both in self.confusions.items()
        }


def percent(value: float, digits: int = 1) -> str:
    """A share in words: 0.125 is "12.5 %"."""
    return f"{100 * value:.{digits}f} %"


def gather(domain: Domain, run: Path) -> Evidence:
    """Encodes the images with the base that the run was prepared with, and fits the probe.

    Raises:
        FileNotFoundError: if data_prep has not been run.
        ValueError: if it was run with other classes.
    """
    base = read_json(
        run / "data" / "report.json", f"run `python -m data_prep DOMAIN --run {run}` first"
    )["base"]
    with quiet_datasets():  # and not load_prepared: calibration and test stay closed
        train, validation = (
            datasets.load_from_disk(run / "data" / name) for name in ("train", "validation")
        )
        rows = datasets.concatenate_datasets([train, validation])
        if rows.features["label"].names != domain.class_names:
            raise ValueError(
                f"'{run}' was prepared with other classes than '{domain.name}' has; run data_prep "
                "again"
            )
        model, processor = load_clip(base)
        image_embeds = encode_rows(model, processor, rows, run / "cache" / "clusters")
    text_embeds = encode_texts(model, processor, domain.canonical_prompts)
    zero_shot = softmax(zero_shot_logits(model, image_embeds, text_embeds), axis=1)  # (N, C)
    labels, groups = (np.array(rows[name][:]) for name in ("label", "group_id"))
    probe = out_of_fold_probabilities(image_embeds, labels, groups, len(domain.classes))
    confusions = {
        "probe": soft_confusion(probe, labels),
        "zero-shot": soft_confusion(zero_shot, labels),
    }
    return Evidence(rows, len(train), labels, probe, confusions, base)


def soft_confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean probability that the images of one class give to another, however many they are.

    Probabilities, not counts of wrong answers: few images say more with them. Clusters of 25 styles
    made from half of the photos held 33.4 % of the wrong answers on the other half, with counts
    31.3 % (25 pairs each, 20 halvings), and both halves' clusters were more alike (adjusted Rand
    index 0.76, with counts 0.66). On the 360 validation drawings of the façades, the probe alone
    gives the true clusters (1.00), with counts not quite (0.77).

    Args: probabilities (N, C), labels (N,) int. Returns: (C, C), row: the label, column: the other;
        the diagonal is 0.
    """
    sums = np.zeros((probabilities.shape[1], probabilities.shape[1]))
    np.add.at(sums, labels, probabilities)
    np.fill_diagonal(sums, 0)
    return sums / np.maximum(np.bincount(labels, minlength=len(sums)), 1)[:, None]


def propose(affinity: np.ndarray, largest: int = 4) -> list[list[int]]:
    """Average linkage, cut where a cluster would be too large or its parts too little confused.

    Args: affinity (C, C) symmetric; largest: how many classes a cluster has at most.

    Returns:
        the members of each cluster; classes that are confused with nothing come last, each in a
        cluster of its own.
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
    return sorted(found, key=lambda members: (len(members) == 1, members))


def agreement(proposed: Sequence[str], own: Sequence[str]) -> dict[str, float]:
    """Of the cluster names of each class, both (C,): how many pairs share one, and the adjusted Rand index."""
    upper = np.triu_indices(len(own), 1)
    ours, theirs = (
        (clusters[:, None] == clusters)[upper] for clusters in map(np.array, (proposed, own))
    )
    counts = {"both": (ours & theirs).sum(), "proposed": ours.sum(), "own": theirs.sum()}
    return {name: int(count) for name, count in counts.items()} | {
        "rand": float(adjusted_rand_score(own, proposed))
    }


def to_yaml(domain: Domain, evidence: Evidence, proposed: dict[str, list[str]]) -> str:
    """The proposal as the `clusters` of a domain file; above each its most confused pair."""
    lines = [
        f"# proposed from {len(evidence.labels)} train and validation images: edit the clusters, "
        "and name them"
    ]
    if len(proposed) == len(domain.classes):
        lines.append(
            "# no pair stands out: a domain file without clusters puts all classes into one"
        )
    lines.append("clusters:")
    affinity = evidence.affinity
    for cluster, members in proposed.items():
        own, others = (
            domain.indices(members),
            domain.indices(members if len(members) > 1 else domain.classes),
        )
        closest = max(((a, b) for a in own for b in others if a != b), key=affinity.__getitem__)
        # on one line
        pair = " ".join(" / ".join(domain.class_names[index] for index in closest).split())
        percentages = ", ".join(
            f"{name} {value}" for name, value in evidence.percentages(*closest).items()
        )
        lines.append(f"  # {'' if len(members) > 1 else 'alone; '}{pair}: {percentages}")
        names = yaml.safe_dump(
            members, default_flow_style=True, allow_unicode=True, width=float("inf")
        )
        lines.append(f"  {cluster}: {names.strip()}")
    return "\n".join(lines)


def compare(domain: Domain, evidence: Evidence, proposed: dict[str, list[str]]) -> dict[str, Any]:
    """What summary and page show.

    Returns:
        sides: the clusters of the proposal, and of the domain file if it has more than one; homes:
        on each side the cluster of each class; agreement: None with one side; pairs: the most
        confused ones.
    """
    names = domain.class_names
    sides = {"proposal": proposed} | (
        {"domain file": domain.clusters} if len(domain.clusters) > 1 else {}
    )
    homes = {
        side: {name: cluster for cluster, members in clusters.items() for name in members}
        for side, clusters in sides.items()
    }
    ranked = sorted(
        combinations(range(len(names)), 2), key=evidence.affinity.__getitem__, reverse=True
    )
    return {
        "sides": sides,
        "homes": homes,
        "agreement": agreement(*([own[name] for name in names] for own in homes.values()))
        if len(sides) > 1
        else None,
        "pairs": [
            {
                "names": [names[a], names[b]],
                "percentages": evidence.percentages(a, b),
                "together": {side: own[names[a]] == own[names[b]] for side, own in homes.items()},
                "directions": [_mistaken(names, evidence, a, b), _mistaken(names, evidence, b, a)],
            }
            for a, b in ranked[:SHOWN_PAIRS]
        ],
    }


def _mistaken(names: list[str], evidence: Evidence, label: int, other: int) -> dict[str, Any]:
    """The train images of one class that the probe takes for the other, the surest first."""
    own = np.flatnonzero(evidence.labels[: evidence.train_size] == label)
    mistaken = own[evidence.probe[own].argmax(axis=1) == other]
    surest = mistaken[np.argsort(-evidence.probe[mistaken, other], kind="stable")][:SHOWN_IMAGES]
    return {
        "names": [names[label], names[other]],
        "mistaken": len(mistaken),
        "images": len(own),
        "percentages": {
            name: percent(both[label, other]) for name, both in evidence.confusions.items()
        },
        "shown": [
            (evidence.rows[int(index)]["source_id"], percent(evidence.probe[index, other], 0))
            for index in surest
        ],
    }


def summary(findings: dict[str, Any]) -> str:
    """The clusters of each class, how they agree, and the most confused pairs, in plain text."""
    sides, homes = findings["sides"], findings["homes"]
    classes = [[name, *(own[name] for own in homes.values())] for name in homes["proposal"]]
    agrees = (
        "The domain file has no clusters of its own (all classes are in one), so there is nothing "
        "to compare with."
    )
    if findings["agreement"]:
        agrees = (
            "{both} of the domain file's {own} pairs are among the proposal's {proposed}; "
            "adjusted Rand index {rand:.2f} (1: the same clusters, 0: alike as by chance)."
        ).format(**findings["agreement"])
    pairs = [
        [
            " / ".join(pair["names"]),
            *pair["percentages"].values(),
            *("yes" if together else "no" for together in pair["together"].values()),
        ]
        for pair in findings["pairs"]
    ]
    header = [
        "most confused",
        *findings["pairs"][0]["percentages"],
        *(f"one cluster in {side}" for side in sides),
    ]
    return "\n\n".join(
        [format_table(["class", *sides], classes), agrees, format_table(header, pairs)]
    )


def write_page(path: Path, domain: Domain, evidence: Evidence, findings: dict[str, Any]) -> None:
    """One page with the pictures of the most confused pairs.

    The same evidence gives the same bytes.
    """
    index_of = {source_id: index for index, source_id in enumerate(evidence.rows["source_id"][:])}
    page = ENVIRONMENT.get_template("clusters.html.jinja").render(
        domain=domain,
        evidence=evidence,
        findings=findings,
        picture=Thumbnails(lambda source_id: evidence.rows[index_of[source_id]]["image"]),
    )
    path.write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
