"""The prepared dataset as a repository: Parquet, and a card that says whose the images are."""

from collections import Counter
from pathlib import Path

from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from nicheclip.domain import Domain
from nicheclip.files import quiet_datasets

MOST_NAMED = 20


def write_dataset(folder: Path, splits: DatasetDict, domain: Domain, license_name: str) -> None:
    """Writes one Parquet file a split, with the images inside, and README.md."""
    (folder / "data").mkdir()
    with quiet_datasets():
        for name, rows in splits.items():
            rows.to_parquet(folder / "data" / f"{name}.parquet")
    files = [{"split": name, "path": f"data/{name}.parquet"} for name in splits]
    card_data = DatasetCardData(
        license=license_name,
        task_categories=["image-classification", "zero-shot-image-classification"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    sizes = "\n".join(f"| {name} | {len(rows)} |" for name, rows in splits.items())
    paragraphs = [
        f"---\n{card_data.to_yaml()}\n---",
        f"# {domain.title}: images",
        f"{domain.description} Verified, without duplicates across splits, and divided by "
        "NicheCLIP; the quality filter has touched nothing that is examined.",
        f"| split | images |\n|---|---:|\n{sizes}",
        f"Classes: {', '.join(domain.class_names)}.",
        f"## Whose the images are\n\n{attributions(splits)}",
    ]
    DatasetCard("\n\n".join(paragraphs) + "\n").save(folder / "README.md")


def attributions(splits: DatasetDict) -> str:
    """How many images are whose, in Markdown; each image's own is in the column `attribution`."""
    counts = Counter(value or "" for rows in splits.values() for value in rows["attribution"])
    unknown = counts.pop("", 0)
    lines = [f"- {count} × {whose}" for whose, count in counts.most_common(MOST_NAMED)]
    if len(counts) > MOST_NAMED:
        lines.append(f"- and {len(counts) - MOST_NAMED} more, in the column `attribution`")
    if unknown:
        lines.append(f"- {unknown} without attribution: ask who prepared them before you use them")
    return "\n".join(lines)
