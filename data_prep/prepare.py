"""The way from images to `RUN/data`: each image read is kept, set aside or dropped, and counted."""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from accelerate.utils import broadcast_object_list
from scipy.special import softmax

from data_prep.clusters import measure
from data_prep.divide import divide
from data_prep.duplicates import Encode, Fingerprints
from data_prep.quality import samples_per_epoch, suspect_labels
from data_prep.report import findings, suspicions, write_report
from data_prep.review import read_decisions, write_review
from data_prep.sources import fetch, read, retention_rows, source_of
from data_prep.sources.rows import Listing, check_classes, unusable
from data_prep.verify import VERIFY_VERSION, verify_rows
from nicheclip.cached_map import map_shards, stored_digests, weights_digest
from nicheclip.clip import encode_images, encode_texts, fast_dtype, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.files import quiet_datasets, replaced_folder, write_json
from nicheclip.processes import processes
from nicheclip.run import features, provenance, run_lock

# What a prepared run depends on; a change of it asks for data_prep again.
DATA_SETTINGS = set(
    "retention evaluation folds splits quality_filter samples_per_class smallest_side "
    "stored_short_side".split()
)


def prepare(
    domain: Domain,
    run: str | Path,
    images: str | Path | None = None,
    seed: int = 0,
    contact: str | None = None,
) -> dict[str, Any] | None:
    """Makes `run`/data (a DatasetDict, report.json and report.html), review.csv and domain.yaml.

    Finished shards of verified and encoded images lie in `run`/cache, so that a killed run goes on
    where it was; under `accelerate launch` the processes share them.

    Returns:
        report.json; None in all processes but the main one.

    Raises:
        ValueError: if a split would have no image of a class, or the images don't fit the domain.
        BlockingIOError: if another command is at work on the run.
    """
    run = Path(run)
    if (run / "data").exists() and not (run / "data" / "dataset_dict.json").is_file():
        raise ValueError(f"'{run / 'data'}' is not prepared data; choose another --run")
    state = processes()
    with run_lock(run), quiet_datasets():
        # The second file is of calibrate.py's errors.html; where both decide, review.csv does.
        decided = read_decisions(run / "review_errors.csv") | read_decisions(run / "review.csv")
        source, fetched = source_of(domain, images), [""]
        if state.is_main_process:
            fetched = [str(fetch(source, run / "images", domain, seed, contact))]
        (location,) = broadcast_object_list(fetched)
        listed, unplaced = read(source, location, domain.class_names)
        rows, unreadable = _verify(listed, domain, run / "cache" / "verified")
        model, processor = load_clip(domain.base)
        dtype = fast_dtype(model.device)
        encode = partial(encode_images, model, processor, dtype=dtype, progress=False)
        weights, inputs = weights_digest(model.state_dict()), processor.image_processor
        settings = f"{dtype} {weights} {inputs.to_json_string()}"
        image_embeds = _encode(rows, encode, settings, run / "cache" / "encoded")
        if not state.is_main_process:
            return None
        prototypes = encode_texts(model, processor, domain.canonical_prompts)
        zero_shot = softmax(zero_shot_logits(model, image_embeds, prototypes), axis=1)  # (N, C)
        fingerprints = Fingerprints.make(rows, image_embeds, encode)
        table = pd.DataFrame(rows.remove_columns("image").to_dict(), dtype=object)
        table = table.rename(columns={"class_name": "label", "split": "given"})
        keys = zip(table.sha256, table.label, strict=True)
        table["decision"] = [decided[key].decision if key in decided else "" for key in keys]
        table = divide(table, fingerprints.near_duplicates(), domain)
        table = suspect_labels(table, image_embeds, zero_shot, domain, seed)
        kept = _kept(table, domain, zero_shot, seed)
        splits = _splits(rows, kept, domain)
        mended = (what for note in table.mended if note for what in note.split("; "))
        report = {
            "provenance": provenance(),
            "domain": domain.name,
            "base": domain.base,
            "images": location,
            "seed": seed,
            "settings": domain.model_dump(mode="json", include=DATA_SETTINGS),
            "fingerprint": fingerprint(splits, domain),
            "near_duplicate_cosines": [round(cosine, 4) for cosine in fingerprints.cosines],
            "filter": domain.quality_filter.model_dump(),
            "mended": dict(Counter(mended)),
            **findings(domain, table, kept, unplaced + unreadable, decided, fingerprints),
            "confusions": measure(domain, kept, image_embeds, zero_shot, seed),
        }
        pictures = rows.select_columns("image").cast_column("image", datasets.Image())
        row_of = {source_id: row for row, source_id in enumerate(rows["source_id"])}
        with replaced_folder(run / "data") as folder:
            splits.save_to_disk(folder)
            if domain.retention is not None:
                retained = retention_rows(domain, run / "retention_images")
                retained.save_to_disk(folder / "retention")
            write_json(folder / "report.json", report)
            page = folder / "report.html"
            write_report(page, report, domain, lambda name: pictures[row_of[name]]["image"])
        domain.save(run / "domain.yaml")
        write_review(run / "review.csv", suspicions(report))
    return report


def _verify(listed: datasets.Dataset, domain: Domain, cache: Path) -> Listing:
    """The readable rows with their stored image, hashes and what was mended; and the others."""
    sides = {"stored_short_side": domain.stored_short_side, "smallest_side": domain.smallest_side}
    identity = [" ".join(pair) for pair in zip(listed["source_id"], listed["version"], strict=True)]
    images, verify = listed.select_columns("image"), partial(verify_rows, **sides)
    settings, description = f"{VERIFY_VERSION} {sides}", "verifying images"
    verified = map_shards(images, verify, identity, settings, cache, description, parallel=True)
    kept_columns = listed.remove_columns(["image", "version"])
    rows = datasets.concatenate_datasets([kept_columns, verified], axis=1)
    told = rows.remove_columns("image").to_pandas()
    lost = told[told.error_kind.notna()]
    columns = lost.source_id, lost.error_kind, lost.error_detail, lost.class_name
    rows = rows.select(np.flatnonzero(told.error_kind.isna()))
    where = f"the {len(rows)} readable images"
    check_classes(set(rows["class_name"]), domain.class_names, where)
    return rows, [unusable(*image) for image in zip(*columns, strict=True)]


def _encode(rows: datasets.Dataset, encode: Encode, settings: str, cache: Path) -> np.ndarray:
    """Unit-length image_embeds (N, D) float32 of the stored images, from the base model."""

    def encode_shard(shard: datasets.Dataset) -> datasets.Dataset:
        images = (row["image"] for row in shard.cast_column("image", datasets.Image()))
        return datasets.Dataset.from_dict({"image_embeds": encode(images, len(shard))})

    identity = stored_digests(rows)
    images, description = rows.select_columns("image"), "encoding with the base model"
    encoded = map_shards(images, encode_shard, identity, settings, cache, description)
    return encoded.with_format("numpy")["image_embeds"][:]


def _kept(table: pd.DataFrame, domain: Domain, zero_shot: np.ndarray, seed: int) -> pd.DataFrame:
    """What is used, one split after the other; with what `features` adds to it."""
    used = table[table.outcome != "dropped"]
    kept = pd.concat([used[used.split == name] for name in domain.parts])
    labels, cross_fit = domain.indices(kept.label), domain.evaluation == "cross_fit"
    columns = []
    for trains in np.stack(kept.trains).T:  # (N,) of each training
        repeats = np.full(len(kept), 0 if cross_fit else 1)
        rng = np.random.default_rng(seed)
        repeats[trains] = samples_per_epoch(labels[trains], domain.samples_per_class, rng)
        columns.append(repeats)
    kept = kept.assign(samples=np.where(trains, repeats, 0), zero_shot_score=None)
    kept["repeats"] = np.transpose(columns).tolist() if cross_fit else repeats
    pool = (kept.split == "train").to_numpy() | cross_fit
    kept.loc[pool, "zero_shot_score"] = zero_shot[kept.index[pool], labels[pool]]
    return kept


def _splits(rows: datasets.Dataset, kept: pd.DataFrame, domain: Domain) -> datasets.DatasetDict:
    schema = features(domain.class_names, domain.evaluation == "cross_fit")
    told = datasets.Features(schema)
    del told["source_id"], told["image"]
    # With a column of each of the two tables that rows is made of: datasets can't join to one that
    # has lost all columns of a part.
    images = rows.select_columns(["source_id", "image"]).cast_column("image", schema["image"])
    splits = datasets.DatasetDict()
    for name in domain.parts:
        own = kept[kept.split == name]
        columns = datasets.Dataset.from_dict(own[list(told)].to_dict("list"), features=told)
        joined = datasets.concatenate_datasets([images.select(own.index), columns], axis=1)
        splits[name] = joined.select_columns(list(schema))
    return splits


def fingerprint(splits: datasets.DatasetDict, domain: Domain) -> str:
    """What training and the exam see: which images, how large, which label, how often."""
    digest = hashlib.sha256(f"{domain.stored_short_side}\n".encode())
    for name in splits:
        columns = (splits[name][column] for column in ("sha256", "label", "repeats"))
        for sha256, label, repeats in sorted(zip(*columns, strict=True)):
            digest.update(f"{name} {sha256} {label} {repeats}\n".encode())
    return digest.hexdigest()
