"""python -m domains.facades.make_base [--output FOLDER]

Trains the tiny CLIP that the façades domain fine-tunes, from nothing, on drawings of
`domains.facades.painter`, and writes a folder that stock `CLIPModel.from_pretrained` and
`CLIPProcessor.from_pretrained` load.

The base is meant to know the domain as web-scale CLIP knows architecture: it sees well, and names
badly. Its captions tell of parts, colours and weather. Only in the last `NAMED_EPOCHS` is a style
named, in `NAMED_SHARE` of the captions, and `WRONG_SHARE` of these names are wrong, mostly by a
style of the same cluster. Run from the root of the repository, it reproduces the base, up to
rounding, in about half an hour on two cores. Needs torch >= 2.9 for Muon. How well it names is
held in tests/test_base.py; a run's scorecard has its zero-shot accuracy and linear probe.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from domains.facades.painter import STYLES, paint
from nicheclip.domain import Domain

HERE = Path(__file__).parent
SIZE = 96  # pixels
SEED, EPOCHS, DRAWINGS = 0, 11, 24000
NAMED_EPOCHS = 4  # the last ones; before them no style has a name
NAMED_SHARE = 0.25  # of the drawings, those whose captions name a style
WRONG_SHARE = 0.61  # of the names, those that are wrong
OTHER_CLUSTER_SHARE = 0.2  # of the wrong names, those from another cluster
BATCH_SIZE = 64
HEAD_WEIGHT, HEAD_SCALE = 3.0, 15.0
ADAMW_RATE, MUON_RATE = 1e-3, 2e-3
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.05
MAX_LOGIT_SCALE = math.log(100)
VOCABULARY = 1000
# streams of chance, independent; 1 and 2 are for drawings that training has not seen
TRAINING, NAMING, CAPTIONS, WORDS = 0, 3, 4, 5

# How a fact is told: by its value where the value has its own phrase, else by its key.
VALUE_PHRASES = {
    "clear": "under a clear sky", "cloudy": "under white clouds", "overcast": "on an overcast day",
    "fog": "in fog", "rain": "in the rain", "snow": "in the snow", "day": "by day",
    "dawn": "at dawn", "dusk": "at dusk", "night": "at night", "street": "on a street",
    "lawn": "behind a lawn", "square": "on a square", "water": "by the water",
    "tree": "behind a tree", "trees": "behind trees", "lamp post": "with a lamp post",
    "car": "with a car", "people": "with people", "nothing": "with nobody in front",
}  # fmt: skip
KEY_PHRASES = {
    "roof": "under a {} roof", "storeys": "with {} storeys", "feature": "with {}",
    "season": "in {}", "view": "seen {}",
}  # fmt: skip
NOUNS = ("building", "building", "house", "front", "old building", "place")
OPENINGS = ("a drawing of", "a drawing of", "a picture of", "a view of", "")
MIRRORED = {"from the left": "from the right", "from the right": "from the left"}


def caption(facts: dict[str, str], name: str | None, rng: np.random.Generator) -> str:
    """A caption of one drawing: its parts, a few `facts`, and the `name` if there is one."""
    keys = [key for key in facts if key not in ("wall", "material", "feature")]
    told = rng.permutation(keys)[: rng.integers(1, 4)].tolist()
    if rng.random() < 0.85:
        told.insert(0, "feature")
    if name is not None and rng.random() < 0.4:
        told = told[:1]
    wall = f"{facts['wall']} {facts['material']}"
    words = [wall] if rng.random() < (0.3 if name else 0.6) else []
    words += [name] if name else []
    words += [NOUNS[rng.integers(len(NOUNS))]]
    words += [VALUE_PHRASES.get(facts[key]) or KEY_PHRASES[key].format(facts[key]) for key in told]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([OPENINGS[rng.integers(len(OPENINGS))], article, *words]).strip()


def noisy_name(style: str, clusters: list[list[str]], rng: np.random.Generator) -> str | None:
    """The name that a drawing's captions give its style: none, the right one, or a wrong one."""
    if rng.random() >= NAMED_SHARE:
        return None
    if rng.random() >= WRONG_SHARE:
        return style
    inside = next(cluster for cluster in clusters if style in cluster)
    elsewhere = rng.random() < OTHER_CLUSTER_SHARE
    choices = [other for other in STYLES if other != style and (other in inside) != elsewhere]
    return choices[rng.integers(len(choices))]


def make_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's lower-casing byte-level BPE, its merges learnt from `texts`; any byte has a token."""
    learnt = CLIPTokenizer().train_new_from_iterator(texts, VOCABULARY)
    merges = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    letters = sorted(ByteLevel.alphabet())
    singles = [*letters, *(f"{letter}</w>" for letter in letters)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in merges[: VOCABULARY - len(singles) - len(special)]]
    vocabulary = [*singles, *map("".join, merges), *special]
    numbers = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(numbers, merges, model_max_length=77)  # type: ignore[arg-type]


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of about 2.5 million parameters, at random: four visual blocks and two of text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    shared = {"hidden_act": "gelu", "projection_dim": 128}
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 77, "hidden_size": 128,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
        "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, **shared,
    }  # fmt: skip
    vision = {
        "image_size": SIZE, "patch_size": 16, "hidden_size": 192,
        "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3, **shared,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def augment(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Mirrors where told, crops and jitters `images`, float (N, 3, SIZE, SIZE) in [0, 1]."""
    count = len(images)
    zoom = torch.empty(count).uniform_(0.86, 1.0)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = zoom * (1 - 2.0 * mirrored), zoom
    matrix[:, :, 2] = (torch.rand(count, 2) * 2 - 1) * (1 - zoom)[:, None]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    brightness = torch.empty(count, 1, 1, 1).uniform_(0.85, 1.15)
    tint = torch.empty(count, 3, 1, 1).uniform_(0.95, 1.05)
    return (images * (brightness * tint)).clamp(0, 1)


def make_optimizers(model: CLIPModel, head: torch.nn.Linear) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the towers, twice as fast with it, AdamW for the rest."""
    named = [*model.named_parameters(), *head.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and "encoder.layers" in name]
    rest = [p for name, p in named if p.ndim != 2 or "encoder.layers" not in name]
    decayed = {"params": [p for p in rest if p.ndim > 1], "weight_decay": WEIGHT_DECAY}
    others = {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}
    muon = torch.optim.Muon(matrices, MUON_RATE, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW([decayed, others], lr=ADAMW_RATE, betas=(0.9, 0.98)), muon]


def bags_of_words(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Each text as an even distribution over its tokens, (len(texts), len(tokenizer))."""
    tokens = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").input_ids
    bags = torch.zeros(len(texts), len(tokenizer)).scatter_(1, tokens, 1.0)
    bags[:, tokenizer.pad_token_id] = 0
    return bags / bags.sum(dim=1, keepdim=True)


def train(processor: CLIPProcessor, clusters: list[list[str]]) -> CLIPModel:
    """A model trained on captioned drawings.

    The loss is CLIP's symmetric contrastive loss plus that of a linear head, later dropped, which
    predicts the words told of a picture from its image_embeds (Joulin et al. 2016, "Learning visual
    features from large weakly supervised data"): with drawings by the thousand only, the
    contrastive loss alone is slow to look past the weather.
    """
    model = make_model(processor.tokenizer)
    images, facts = torch.empty(DRAWINGS, 3, SIZE, SIZE, dtype=torch.uint8), []
    styles = [STYLES[i % len(STYLES)] for i in range(DRAWINGS)]
    for i, style in enumerate(tqdm(styles, desc="drawing")):
        picture, told = paint(style, np.random.default_rng([SEED, TRAINING, i]), SIZE)
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        facts.append((told, told | {"view": MIRRORED.get(told["view"], told["view"])}))
    rng = np.random.default_rng([SEED, NAMING])
    names = [noisy_name(style, clusters, rng) for style in styles]
    rng = np.random.default_rng([SEED, CAPTIONS])
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    head = torch.nn.Linear(model.config.projection_dim, len(processor.tokenizer))  # type: ignore[arg-type]
    optimizers = make_optimizers(model, head)
    batches = DRAWINGS // BATCH_SIZE
    steps = EPOCHS * batches

    def rate(step: int) -> float:
        warmup = (step + 1) / (WARMUP_SHARE * steps)
        return min(warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    for epoch in range(EPOCHS):
        named = epoch >= EPOCHS - NAMED_EPOCHS
        order = torch.randperm(DRAWINGS)[: batches * BATCH_SIZE].view(batches, BATCH_SIZE)
        bar = tqdm(order, desc=f"epoch {epoch + 1} of {EPOCHS}")
        for chosen in bar:
            mirrored = torch.rand(BATCH_SIZE) < 0.5
            shown = [facts[i][flip] for i, flip in zip(chosen, mirrored.int(), strict=True)]
            called = [names[i] if named else None for i in chosen]
            captions = [caption(told, name, rng) for told, name in zip(shown, called, strict=True)]
            words = bags_of_words(processor.tokenizer, [" ".join(told.values()) for told in shown])
            tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
            pixels = (augment(images[chosen].float() / 255, mirrored) - mean) / std
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**tokens, pixel_values=pixels, return_loss=True)
                guess = head(output.image_embeds * HEAD_SCALE)  # (BATCH_SIZE, len(tokenizer))
            told_loss = F.cross_entropy(guess.float(), words)
            (output.loss + HEAD_WEIGHT * told_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
            bar.set_postfix(contrastive=output.loss.item(), words=told_loss.item(), refresh=False)
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains the tiny CLIP base of the façades domain.")
    parser.add_argument("--output", type=Path, default=HERE / "base")
    output, domain = parser.parse_args().output, Domain.load(HERE)
    torch.manual_seed(SEED)
    rng = np.random.default_rng([SEED, WORDS])
    painted = [paint(style, rng, 24)[1] for style in STYLES for _ in range(50)]
    texts = [caption(facts, STYLES[i % len(STYLES)], rng) for i, facts in enumerate(painted * 4)]
    tokenizer = make_tokenizer(texts + domain.prompt_bank[0] * 20)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    processor = CLIPProcessor(image_processor, tokenizer)
    train(processor, list(domain.clusters.values())).half().save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
