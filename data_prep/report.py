"""What data_prep tells of its own work: report.json, review.csv, and a page with pictures.

RUN/data/report.html shows in a minute whether the data is sane, see report.html.jinja.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from scipy.spatial.distance import squareform

from data_prep.clusters import agreement, propose
from data_prep.duplicates import Fingerprints
from data_prep.quality import threshold_of
from data_prep.review import Suspicion
from data_prep.sources.rows import Entry
from nicheclip.domain import Domain, QualityFilter
from nicheclip.evaluation.intervals import detectable_difference
from nicheclip.publishing.pages import Thumbnails, environment

LEAST_LIKELY = 24  # images, and
MOST_ALIKE = 12  # pairs, for a person to look at
SMALL_EXAM = 10  # test images of a class; with fewer, its own accuracy says next to nothing
SHOWN = 60  # entries of a gallery

# The kinds of what is set aside, those worth a look first: after which step of the funnel they are
# missing, and what they mean.
READING, COPIES, LEAKS = "readable, with a label", "unique, uncontradicted", "without leaks"
KINDS = {
    "conflict": (COPIES, "The same picture under two labels: at least one of them is wrong."),
    "leak": (LEAKS, "Nearly the same as an image of the split named, which it would make easy."),
    "exact duplicate": (COPIES, "The same file again, under the same label. It is used once."),
    "dropped by hand": (COPIES, "Someone wrote “drop” into review.csv."),
    "unreadable": (READING, "The file does not decode, or not to its end."),
    "too small": (READING, "Below smallest_side of the domain file."),
    "blank": (READING, "Every pixel has the same colour."),
    "no class": (READING, "Beside the class folders, or labelled with none of the classes."),
}


def findings(
    domain: Domain,
    images: pd.DataFrame,
    kept: pd.DataFrame,
    lost: list[Entry],
    decided: dict[tuple[str, str], Suspicion],
    fingerprints: Fingerprints,
) -> dict[str, Any]:
    """What report.json says of images and classes.

    Args:
        images: all that can be read, as `suspect_labels` gives them.
        kept: those that are used, with how often an epoch `repeats` each.
        lost: what has no class, or can't be read.
    """
    quarantined = lost + _entries(images[images.kind.notna()], "kind", "other", "detail")
    doubted = images[images.outcome.notna()].sort_values("score", kind="stable")
    train = kept[kept["samples"] > 0]
    unlikely = train.sort_values("score", kind="stable").head(LEAST_LIKELY)
    several = kept[kept.duplicated("group_id", keep=False)]
    members = several[["source_id", "label", "split"]].groupby(several.group_id, sort=False)
    groups = (group.to_dict("records") for _, group in members)
    parts = images.split.to_numpy(dtype=str)
    alike = [
        images.loc[pair, ["source_id", "split"]].assign(cosine=round(cosine, 4)).to_dict("records")
        for *pair, cosine in fingerprints.most_alike_across(parts, MOST_ALIKE)
    ]
    classes = _classes(domain, images, kept, quarantined)
    counts = {
        "read": len(images) + len(lost),
        "quarantined": dict(Counter(entry["kind"] for entry in quarantined)),
        "dropped_by_filter": sum(entry["filter"]["dropped"] for entry in classes),
        "left_out_of_training": int((kept.outcome == "left out").sum()),
        "kept": {name: sum(entry[name] for entry in classes) for name in domain.parts},
        "train_samples_per_epoch": sum(entry["samples"] for entry in classes),
    }
    gone = len(quarantined) + counts["dropped_by_filter"]
    assert counts["read"] == len(kept) + gone, "an image is unaccounted for"
    return {
        "counts": counts,
        "classes": classes,
        "warnings": warnings(classes, images, decided, alike, fingerprints),
        "quarantined": quarantined,
        "suspects": _entries(doubted, "suspected_label", "score", "outcome"),
        "least_likely_kept": _entries(unlikely, "suspected_label", "score"),
        "near_duplicates": sorted(groups, key=len, reverse=True),
        "alike_across_splits": alike,
    }


def _entries(images: pd.DataFrame, *columns: str) -> list[Entry]:
    return images[["source_id", "label", "sha256", *columns]].round(5).to_dict("records")


def _classes(
    domain: Domain, images: pd.DataFrame, kept: pd.DataFrame, quarantined: list[Entry]
) -> list[Entry]:
    """How many images of each class went which way."""
    cross_fit = domain.evaluation == "cross_fit"
    pool = images[(images.split != "") if cross_fit else (images.split == "train")]
    judged = pool[["wanted", "suspect"]].assign(images=1, dropped=pool.outcome == "dropped")
    filtered = judged.astype(int).groupby(pool.label).sum().to_dict("index")
    sizes = pd.crosstab(kept.label, kept.split)[list(domain.parts)]
    examined = sizes.sum(axis=1) if cross_fit else sizes.test
    sizes = sizes.assign(examined=examined).to_dict("index")
    samples = kept["samples"].groupby(kept.label).sum().to_dict()
    aside = Counter(entry["label"] for entry in quarantined)
    return [
        {"name": name, **sizes[name], "quarantined": aside[name], "samples": samples[name]}
        | {"filter": filtered[name]}
        for name in domain.class_names
    ]


def warnings(
    classes: list[Entry],
    images: pd.DataFrame,
    decided: dict[tuple[str, str], Suspicion],
    alike: list[list[Entry]],
    fingerprints: Fingerprints,
) -> list[str]:
    """What someone should look at before training."""
    found = []
    for entry in classes:
        wanted, pool, taken = (entry["filter"][key] for key in ("wanted", "images", "suspect"))
        if wanted > taken:
            found.append(
                f"{entry['name']}: the filter wanted {wanted} of {pool} images, and the cap held "
                f"it to {taken}; rather a class that the base model does not know than noise"
            )
    small = [f"{e['name']} ({e['examined']})" for e in classes if e["examined"] < SMALL_EXAM]
    if small:
        told = f"fewer than {SMALL_EXAM} examined, so the class's own accuracy will say little"
        found.append(f"{told}: {', '.join(small)}; add images, or merge classes")
    present = set(zip(images.sha256, images.label, strict=True))
    if unused := [line.source_id for key, line in decided.items() if key not in present]:
        found.append(f"{len(unused)} decisions in review.csv match no image: {unused[0]} …")
    # The search asks the hash first, and a crop changes that soon.
    if any(pair[0]["cosine"] >= fingerprints.cosines[-1] for pair in alike):
        found.append(
            "pictures in different splits or folds are as alike as copies: see “most alike”"
        )
    return found


def suspicions(report: dict[str, Any]) -> list[Suspicion]:
    """The lines of review.csv: conflicts, and suspects of the filter."""
    lines = []
    for entry in report["quarantined"]:
        if entry["kind"] == "conflict":
            image = entry["source_id"], entry["label"], entry["sha256"]
            reason = f"conflict: {entry['detail']} ({entry['other']})"
            lines.append(Suspicion(*image, reason, outcome="set aside"))
    for entry in report["suspects"]:
        told = {"score": f"{entry['score']:.5f}", "reason": "wrong label?"}
        lines.append(Suspicion(**entry | told))
    return lines


def write_report(
    path: Path, report: dict[str, Any], domain: Domain, picture: Callable[[str], Image.Image]
) -> None:
    """Writes the page; `picture` gives the stored image of a source_id, or raises KeyError."""
    aside, suspects = report["quarantined"], report["suspects"]
    mistaken = Counter((entry["label"], entry["suspected_label"]) for entry in suspects)
    proposed = propose(domain.class_names, squareform(report["confusions"]["affinity"]))
    page = environment(Path(__file__).parent).get_template("report.html.jinja")
    content = page.render(
        report=report,
        domain=domain,
        thumbnails=Thumbnails(picture),
        funnel=_funnel(report["counts"], Counter(entry["kind"] for entry in aside)),
        aside={kind: _pairs(kind, aside) for kind in KINDS},
        kinds=KINDS,
        mistaken=[(pair, number) for pair, number in mistaken.most_common(5) if number > 1],
        proposed=proposed,
        cluster_of={name: key for key, members in domain.clusters.items() for name in members},
        agreement=agreement(domain, proposed),
        threshold=threshold_of(QualityFilter(**report["filter"])),
        detectable_difference=detectable_difference,
        small_exam=SMALL_EXAM,
        most=SHOWN,
    )
    path.write_text(content, encoding="utf-8", newline="\n")


def _funnel(counts: dict[str, Any], aside: Counter[str]) -> list[tuple]:
    """The steps from reading to training: title, pieces of the bar, number of images, remark."""
    left, kept, dropped = counts["read"], counts["kept"], counts["dropped_by_filter"]
    steps: list[tuple] = [("images read", [("before", left)], left, "")]
    for step in (READING, COPIES, LEAKS):
        lost = {kind: number for kind, number in aside.items() if KINDS[kind][0] == step}
        left -= sum(lost.values())
        remark = ", ".join(f"{number:,} {kind}" for kind, number in lost.items())
        steps.append((step, [("before", left), ("lost", sum(lost.values()))], left, remark))
    suspects = dropped + counts["left_out_of_training"]
    remark = f"{suspects:,} suspected of a wrong label"
    if suspects > dropped:
        remark += ", left out of training only"
    steps.append(("kept", [*kept.items(), ("lost", dropped)], left - dropped, remark))
    samples, train = counts["train_samples_per_epoch"], kept.get("train")
    if train is None:
        train = sum(kept.values()) - counts["left_out_of_training"]
    remark = f"{samples / train:.1f} of each train image on average"
    return [*steps, ("samples", [("train", train), ("again", samples - train)], samples, remark)]


def _pairs(kind: str, aside: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each entry of a kind with the other image that it names; two that name each other once."""
    entries = {entry["source_id"]: entry for entry in aside}
    pairs = {}
    for entry in aside:
        if entry["kind"] == kind:
            named = [entry["source_id"], *([entry["other"]] if entry["other"] else [])]
            pairs[frozenset(named)] = [entries.get(each, {"source_id": each}) for each in named]
    return list(pairs.values())
