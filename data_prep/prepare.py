"""The way from images to `RUN/data`: every image read is kept, rejected or dropped, and counted."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from scipy.special import softmax

from data_prep.duplicates import near_duplicate_groups
from data_prep.quality import choose_drops, visits_per_epoch
from data_prep.sources.facades import paint_facades
from data_prep.sources.folders import quiet_datasets, read_folders
from data_prep.splits import HELD_OUT, assign_splits
from data_prep.verify import verify_image
from nicheclip.data import SPLITS, features
from nicheclip.domain import Domain
from nicheclip.results import read_json, replaced_folder, write_json
from nicheclip.zero_shot import encode_images, encode_texts, load_clip, zero_shot_logits


def prepare(domain: Domain, run: str | Path, images: str | Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Makes `run`/data (a DatasetDict and report.json) and `run`/domain.yaml.

    Args:
        images: class folders to read instead of the domain's own source.
        seed: of the painter and of the choice of the images that are oversampled once more.

    Returns:
        the report, as in report.json.

    Raises:
        ValueError: if a split would have no image of a class, or the images don't fit the domain.
    """
    run = Path(run)
    if (run / "data").exists() and not (run / "data" / "dataset_dict.json").is_file():
        raise ValueError(f"'{run / 'data'}' is not prepared data and would be overwritten; choose another --run")
    folder, truth = _source_folder(domain, run, images, seed)
    rows, rejected = read_folders(folder, domain.class_names)
    read = len(rows) + len(rejected)

    rows, unreadable = _verify(rows, domain)
    with quiet_datasets():
        rows, duplicates = _group(rows)
        splits, leaks = _split(rows, domain)
        train, dropped, filter_counts = _filter(splits["train"], domain)
        splits["train"] = _oversample(train, domain, seed)
    rejected += unreadable + duplicates + leaks

    report = _report(domain, splits, read, rejected, dropped, filter_counts)
    report |= {"images": str(folder), "seed": seed, "fingerprint": fingerprint(splits)}
    if truth:
        report["planted_faults"] = _found_faults(truth, splits, rejected, dropped)
    with quiet_datasets():
        _save(splits, report, domain, run)
    return report


def _report(
    domain: Domain, splits: dict[str, datasets.Dataset], read: int, rejected: list, dropped: list, filter_counts: list
) -> dict[str, Any]:
    kept = {name: len(rows) for name, rows in splits.items()}
    if read != sum(kept.values()) + len(rejected) + len(dropped):
        raise RuntimeError(f"{read} images read, but kept {kept}, {len(rejected)} rejected, {len(dropped)} dropped")
    sizes = {name: Counter(rows["label"]) for name, rows in splits.items()}
    return {
        "domain": domain.name,
        "base": domain.base,
        "counts": {
            "read": read,
            "rejected": dict(Counter(entry["reason"].split(":")[0] for entry in rejected)),
            "dropped_by_filter": len(dropped),
            "kept": kept,
            "train_visits_per_epoch": int(np.sum(splits["train"]["repeats"])),
        },
        "classes": [
            {"name": name, **{split: sizes[split][index] for split in SPLITS}, "filter": counts}
            for index, (name, counts) in enumerate(zip(domain.class_names, filter_counts, strict=True))
        ],
        "rejected": rejected,
        "dropped": dropped,
    }


def fingerprint(splits: dict[str, datasets.Dataset]) -> str:
    """Which images lie in which split under which label; later stages compare it."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for sha256, label in sorted(zip(splits[name]["sha256"], splits[name]["label"], strict=True)):
            digest.update(f"{name} {sha256} {label}\n".encode())
    return digest.hexdigest()


def _source_folder(domain: Domain, run: Path, images: str | Path | None, seed: int) -> tuple[Path, dict[str, Any]]:
    if images is None and domain.source.kind == "facades":
        clusters = list(domain.clusters.values())
        folder = paint_facades(run / "images", clusters, seed, **domain.source.options)
        return folder, read_json(folder / "truth.json", "remove the folder and run data_prep again")
    if images is None and domain.source.path is None:
        raise ValueError(f"domain '{domain.name}' names no images; pass --images FOLDER, one folder a class inside")
    return Path(images or domain.source.path), {}


def _verify(rows: datasets.Dataset, domain: Domain) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    check = partial(verify_image, stored_short_side=domain.stored_short_side)
    schema = datasets.Features(
        {
            **rows.features,
            "image": datasets.Image(decode=False),
            "sha256": datasets.Value("string"),
            "phash": datasets.Value("string"),
            "error": datasets.Value("string"),
        }
    )
    processes = min(os.cpu_count() or 1, len(rows) // 500) or None  # a process more pays from some hundred images
    rows = rows.map(check, features=schema, num_proc=processes, load_from_cache_file=False, desc="verifying images")
    errors = rows["error"][:]
    unreadable = [
        {"source_id": source_id, "reason": f"unreadable: {error}"}
        for source_id, error in zip(rows["source_id"], errors, strict=True)
        if error is not None
    ]
    return rows.select([index for index, error in enumerate(errors) if error is None]), unreadable


def _group(rows: datasets.Dataset) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    """Drops exact copies and contradicting labels; names the group of near-duplicates of the rest."""
    first: dict[str, int] = {}
    labels_of: dict[str, set[str]] = {}
    hashes, class_names, source_ids, given = (rows[name][:] for name in ("sha256", "class_name", "source_id", "split"))
    # A held-out image is kept rather than its copy in the train pool.
    for index in sorted(range(len(rows)), key=lambda index: given[index] in (None, "train")):
        first.setdefault(hashes[index], index)
        labels_of.setdefault(hashes[index], set()).add(class_names[index])
    keep, rejected = [], []
    for index, sha256 in enumerate(hashes):
        if len(labels_of[sha256]) > 1:
            reason = f"conflict: the same file under {' and '.join(sorted(labels_of[sha256]))}"
        elif first[sha256] != index:
            reason = f"exact duplicate: of {source_ids[first[sha256]]}"
        else:
            keep.append(index)
            continue
        rejected.append({"source_id": source_ids[index], "reason": reason})
    rows = rows.select(keep)
    groups = near_duplicate_groups(rows["phash"][:])
    name_of: dict[int, str] = {}
    for group, sha256 in zip(groups, rows["sha256"], strict=True):
        name_of[group] = min(sha256[:16], name_of.get(group, sha256))
    return rows.add_column("group_id", [name_of[group] for group in groups]), rejected


def _split(rows: datasets.Dataset, domain: Domain) -> tuple[dict[str, datasets.Dataset], list[dict[str, str]]]:
    """Keeps the splits that the source decides, deals out the others, and lets no group cross two of them."""
    index_of = {name: index for index, name in enumerate(domain.class_names)}
    labels = np.array([index_of[name] for name in rows["class_name"]])
    groups, given, source_ids = (rows[name][:] for name in ("group_id", "split", "source_id"))
    assigned = np.array([split or "train" for split in given], dtype=object)
    to_fill = tuple(name for name in HELD_OUT if name not in assigned)
    pool = np.flatnonzero(assigned == "train")
    if to_fill:
        assigned[pool] = assign_splits(labels[pool], [groups[index] for index in pool], domain.splits, to_fill)
    owner: dict[str, str] = {}
    for name in (*HELD_OUT, "train"):
        for index in np.flatnonzero(assigned == name):
            owner.setdefault(groups[index], name)
    leaked = np.array([owner[group] != split for group, split in zip(groups, assigned, strict=True)])
    rejected = [
        {"source_id": source_ids[index], "reason": f"leak: near-duplicate of an image in {owner[groups[index]]}"}
        for index in np.flatnonzero(leaked)
    ]
    schema = features(domain.class_names)
    rows = rows.add_column("label", labels).add_column("repeats", np.ones(len(rows), dtype=np.int32))
    rows = rows.add_column("zero_shot_score", [None] * len(rows)).select_columns(list(schema)).cast(schema)
    splits = {name: rows.select(np.flatnonzero((assigned == name) & ~leaked)) for name in SPLITS}
    for name, split in splits.items():
        empty = sorted(set(range(len(index_of))) - set(split["label"]))
        if empty:
            raise ValueError(
                f"the {name} split has no image of: {', '.join(domain.class_names[index] for index in empty)}; "
                "add images, merge classes, or change splits in the domain file"
            )
    return splits, rejected


def _filter(train: datasets.Dataset, domain: Domain) -> tuple[datasets.Dataset, list[dict[str, Any]], list]:
    model, processor = load_clip(domain.base)
    text_embeds = encode_texts(model, processor, domain.canonical_prompts)
    image_embeds = encode_images(
        model, processor, (row["image"] for row in train), len(train), description="scoring train with the base model"
    )
    labels = np.array(train["label"])
    scores = softmax(zero_shot_logits(model, image_embeds, text_embeds), axis=1)[np.arange(len(labels)), labels]
    drop, classes = choose_drops(scores, labels, domain.quality_filter, len(domain.classes))
    train = train.remove_columns("zero_shot_score").add_column("zero_shot_score", scores.astype(np.float32))
    source_ids = train["source_id"][:]
    dropped = [
        {"source_id": source_ids[index], "label": domain.class_names[labels[index]], "score": float(scores[index])}
        for index in np.flatnonzero(drop)
    ]
    return train.select(np.flatnonzero(~drop)), dropped, classes


def _oversample(train: datasets.Dataset, domain: Domain, seed: int) -> datasets.Dataset:
    visits = visits_per_epoch(np.array(train["label"]), domain.samples_per_class, np.random.default_rng(seed))
    schema = features(domain.class_names)
    return train.remove_columns("repeats").add_column("repeats", visits).select_columns(list(schema)).cast(schema)


def _found_faults(truth: dict[str, Any], splits: dict, rejected: list, filtered: list) -> dict[str, Any]:
    """How many of the painter's faults were found. A leak is a train copy of a held-out drawing."""
    reasons = {entry["source_id"]: entry["reason"].split(":")[0] for entry in rejected}
    dropped = {entry["source_id"] for entry in filtered}
    wrong = set(truth["wrong_labels"]) - set(reasons)
    leaks = {copy for copy, original in truth["near_duplicates"].items() if not original.startswith("train/")}
    group_of = {
        source: group
        for rows in splits.values()
        for source, group in zip(rows["source_id"], rows["group_id"], strict=True)
    }
    copies = {
        copy: original
        for copy, original in truth["near_duplicates"].items()
        if copy in group_of and original in group_of
    }
    return {
        "wrong_labels": {"planted": len(wrong), "dropped": len(wrong & dropped), "dropped_in_all": len(dropped)},
        "leaks": {"planted": len(leaks), "found": sum(reasons.get(leak) == "leak" for leak in leaks)},
        "near_duplicates_in_train": {
            "planted": len(copies),
            "grouped": sum(group_of[copy] == group_of[original] for copy, original in copies.items()),
        },
        "unreadable": {
            "planted": len(truth["unreadable"]),
            "found": sum(reasons.get(name) == "unreadable" for name in truth["unreadable"]),
        },
    }


def _save(splits: dict[str, datasets.Dataset], report: dict[str, Any], domain: Domain, run: Path) -> None:
    with replaced_folder(run / "data") as folder:
        datasets.DatasetDict(splits).save_to_disk(folder)
        write_json(folder / "report.json", report)
    domain.save(run / "domain.yaml")
