"""The app as its visitors meet it: through HTTP, with gradio_client."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from gradio_client import Client, handle_file
from PIL import Image

from domains.facades.paint import ATTRIBUTION
from model_card.build import save_examples
from nicheclip import NicheClassifier, Prediction
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import Measure
from nicheclip.files import read_json, write_json
from nicheclip.images import to_rgb
from space import __main__ as entry
from space.app import EMPTY, LAUNCH, TOP_CLASSES, answer, build_app, published
from space.publish import write_space
from space.scorecard import score_table
from space.search import FOUND, NOTHING_ASKED, UNREADABLE

UNSURE = "**Not sure.** The best guess is art deco"


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Client]:
    app = build_app(run / "hub")
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield Client(url, verbose=False, analytics_enabled=False)
    app.close()


def classify(client: Client, path: Path) -> tuple[str, dict[str, float]]:
    sentence, bars, _ = client.predict(handle_file(path), api_name="/classify")
    return sentence, {bar["label"]: bar["confidence"] for bar in bars.get("confidences") or []}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_the_app_says_what_the_classifier_says(client, run, tmp_path, suffix):
    """Also for a photo that its camera held upright (EXIF orientation 6)."""
    photo, exif = tmp_path / f"photo{suffix}", Image.Exif()
    exif[0x0112] = 6
    Image.open(next((run / "hub" / "examples").iterdir())).save(photo, exif=exif)

    sentence, bars = classify(client, photo)

    expected = NicheClassifier.from_pretrained(run / "hub")([photo])[0]
    assert sentence == answer(expected)
    assert list(bars) == list(expected.probabilities)[:TOP_CLASSES]
    assert bars == pytest.approx({name: expected.probabilities[name] for name in bars}, abs=1e-5)


@pytest.mark.parametrize("kind", ["transparent", "16 bits"])
def test_a_photo_is_shown_to_the_model_as_in_training(client, run, tmp_path, kind):
    picture = Image.open(next((run / "hub" / "examples").iterdir()))
    if kind == "transparent":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    else:
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    picture.save(tmp_path / "photo.png")
    expected = NicheClassifier.from_pretrained(run / "hub")([to_rgb(picture)])[0]
    bars = classify(client, tmp_path / "photo.png")[1]
    assert bars == pytest.approx({name: expected.probabilities[name] for name in bars}, abs=1e-5)


@pytest.mark.parametrize("content", [b"I am a text.", b"", b"half"])
def test_a_file_that_is_no_picture_gets_a_sentence(client, run, tmp_path, content):
    photo = next((run / "hub" / "examples").iterdir())
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:800] if content == b"half" else content)

    assert classify(client, broken) == (UNREADABLE, {})
    assert classify(client, photo)[0] != UNREADABLE  # the server is still there


def test_examples_and_search_are_there_where_they_were_published(run: Path, tmp_path: Path):
    unneeded = shutil.ignore_patterns("examples", "index")
    shutil.copytree(run / "hub", tmp_path / "hub", ignore=unneeded)
    for folder, examples, search in ((run / "hub", 1, 1), (tmp_path / "hub", 0, 0)):
        blocks = list(build_app(folder).blocks.values())
        assert sum(block.elem_classes == ["examples"] for block in blocks) == examples
        assert [getattr(block, "label", "") for block in blocks].count("Search") == search


def test_a_space_holds_the_code_that_it_needs_and_no_other(tmp_path: Path):
    write_space(tmp_path, "you/model", "Title", "other")
    code = "import nicheclip, space.app; print(nicheclip.__file__, space.app.__file__)"
    command = [sys.executable, "-c", code]
    started = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert started.stdout.count(str(tmp_path)) == 2, started.stderr
    assert not list(tmp_path.rglob("training")) and not list(tmp_path.rglob("publish.py"))
    pinned = dict(line.split("==") for line in (tmp_path / "requirements.txt").read_text().split())
    assert {"torch", "transformers", "pillow", "datasets", "numpy"} <= pinned.keys()
    assert pinned["transformers"] == version("transformers") and "gradio" not in pinned


def test_examples_are_of_classes_side_by_side_and_stay_in_their_folder(run: Path, tmp_path: Path):
    save_examples(run, tmp_path / "examples", 5)
    clusters = list(Domain.load(run).clusters.values())
    expected = [names[0] for names in clusters] + [clusters[0][1]]
    assert {path.stem for path in (tmp_path / "examples").iterdir()} == set(expected)
    own = tmp_path / "run"
    own.mkdir()
    names = ["../T-shirt/top", "bag"]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    rows = {"image": [Image.new("RGB", (9, 9))] * 2, "label": [0, 0]}
    DatasetDict(test=Dataset.from_dict(rows, features=features)).save_to_disk(own / "data")
    changes = {"classes": {name: [name] for name in names}, "clusters": {"all": names}}
    raw = Domain.load(run).model_dump(mode="json") | changes
    (own / "domain.yaml").write_text(yaml.safe_dump(raw))
    save_examples(own, own / "examples", 2)  # there is no picture of a bag
    assert [path.name for path in own.rglob("*.jpg")] == ["..∕T-shirt∕top.jpg"]


def test_a_picture_finds_itself_and_words_find_their_class(client: Client, run: Path):
    photo = sorted((run / "hub" / "examples").iterdir())[0]
    for found in (
        client.predict(handle_file(photo), api_name="/classify")[2],
        client.predict(handle_file(photo), api_name="/search_by_photo")[1],
    ):
        label, split, cosine, whose = found[0]["caption"].split(" · ")
        assert (label, split, whose) == (photo.stem, "test", ATTRIBUTION)
        assert float(cosine) > 0.9  # the index holds a JPEG of it
    sentence, found = client.predict("  ", api_name="/search")
    assert (sentence, found) == (NOTHING_ASKED, [])
    # longer than CLIP reads
    assert len(client.predict("word " * 200, api_name="/search")[1]) == FOUND


def test_fifty_visitors_at_once_get_the_same_answer(client: Client, run: Path):
    photo = next((run / "hub" / "examples").iterdir())
    alone = classify(client, photo)
    jobs = [client.submit(handle_file(photo), api_name="/classify") for _ in range(50)]
    assert {job.result(timeout=120)[0] for job in jobs} == {alone[0]}


def test_no_photo_no_answer(client: Client):
    assert client.predict(None, api_name="/classify")[0] == EMPTY


@pytest.mark.parametrize(
    ("confidence", "threshold", "words"),
    [
        (0.831, 0.46, "**Art deco**, 83 %"),
        (0.46, 0.46, "**Art deco**, 46 %"),
        (0.9999, 0.46, "**Art deco**, over 99 %"),
        (0.31, 0.46, f"{UNSURE} (31 %), below the 46 % under which"),
        (0.4581, 0.4612, f"{UNSURE} (45.8 %), below the 46.1 % under which"),
    ],
)
def test_the_answer_in_words(confidence: float, threshold: float, words: str):
    probabilities = {"art deco": confidence, "gothic": 1 - confidence}
    prediction = Prediction(probabilities, ["art deco"], False, threshold)
    assert answer(prediction).replace("\N{NO-BREAK SPACE}", " ").startswith(words)


def test_other_classes_that_it_could_be_are_named():
    probabilities = {"art deco": 0.5, "gothic": 0.3, "brutalism": 0.15, "bauhaus": 0.05}
    likely = ["art deco", "gothic", "brutalism"]
    sure = Prediction(probabilities, likely, False, threshold=0.4)
    assert answer(sure).endswith("It could also be gothic or brutalism.")
    unsure = Prediction(probabilities, likely, False, threshold=0.6)
    assert answer(unsure).startswith("**Art deco, gothic or brutalism.** Not sure which")


def test_a_picture_outside_of_the_domain_gets_no_class():
    outside = Prediction({"art deco": 0.99, "gothic": 0.01}, ["art deco"], True, threshold=0.4)
    assert outside.label is None
    assert answer(outside).startswith("**This looks like nothing that the model knows.**")
    assert "art deco" not in answer(outside)


def test_the_scorecard_shows_every_metric_and_gate(run: Path):
    scorecard = read_json(run / "hub" / "scorecard.json", "")
    measures = {name: Measure(**fields) for name, fields in scorecard["metrics"].items()}
    table = score_table(measures, scorecard["gates"]).replace("\N{NO-BREAK SPACE}", " ")
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(measures)
    for measure in measures.values():
        assert f"**{measure.value:.3f}** [{measure.low:.3f}, {measure.high:.3f}]" in table
    assert len(re.findall(r"✓ pass|✗ fail|\? undecided", table)) == len(scorecard["gates"])
    assert all(re.search("pass|fail|undecided", row) for row in rows[: len(scorecard["gates"])])


def test_a_run_stands_for_its_hub_folder(run: Path):
    assert published(run) == published(run / "hub") == run / "hub"


def test_a_folder_of_an_older_version_is_refused(run: Path, tmp_path: Path):
    hub = shutil.copytree(run / "hub", tmp_path / "hub")
    scorecard = read_json(hub / "scorecard.json", "")
    scorecard["outside"] = scorecard.pop("ood")
    write_json(hub / "scorecard.json", scorecard)
    with pytest.raises(ValueError, match="has no 'ood'.*python -m model_card RUN"):
        build_app(hub)


def test_wrong_sources_end_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    command, unfetched = f"python -m model_card {re.escape(str(tmp_path))}", "can't be fetched from"
    for source, remedy in (
        (str(tmp_path), f"holds no published model.*{command}"),
        ("runs/no-such-run", f"no folder here and {unfetched} the Hub"),
        ("not a repo id", f"no folder here and {unfetched} the Hub"),
    ):
        monkeypatch.setattr("sys.argv", ["space", source])
        with pytest.raises(SystemExit, match=f"^space: .*{remedy}"):
            entry.main()
