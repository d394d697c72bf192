"""CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv:2405.18541); needs `pip install peft`."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPProcessor

from benchmarks.judge import Result, evaluate
from nicheclip.clip import encode_images, encode_texts, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation.calibration import best_nll
from nicheclip.run import load_prepared
from nicheclip.training.data import TrainingSamples

RATES = (2e-4, 1e-3, 5e-3)  # the paper's, and larger ones for small bases
EPOCHS, BATCH = 10, 32


def clip_lora(data_run: Path, domain: Domain) -> Result:
    """Low-rank updates of all attentions, merged; the rate of the lowest NLL on validation."""
    validation = load_prepared(data_run)["validation"]
    tried = []
    for rate in RATES:
        model, processor = _trained(data_run, domain, rate)
        images = (row["image"] for row in validation)
        embeds = encode_images(model, processor, images, len(validation), progress=False)
        prototypes = encode_texts(model, processor, domain.canonical_prompts)
        logits = zero_shot_logits(model, embeds, prototypes)
        tried.append((best_nll(logits, np.array(validation["label"])), rate, model))
    _, rate, best = min(tried, key=lambda entry: entry[:2])
    return evaluate(best, processor, domain, data_run) | {"learning_rate": rate}


def _trained(data_run: Path, domain: Domain, rate: float) -> tuple[CLIPModel, CLIPProcessor]:
    from peft import LoraConfig, get_peft_model  # nothing else here needs it

    model, processor = load_clip(domain.base)
    rows, classes = load_prepared(data_run)["train"], domain.prompt_bank[1]
    samples = TrainingSamples(rows, classes, domain.augmentation, processor, seed=0)
    samples.sample("natural")
    torch.manual_seed(0)
    of_attention = ["q_proj", "k_proj", "v_proj"]
    updates = LoraConfig(r=2, lora_alpha=2, lora_dropout=0.25, target_modules=of_attention)
    adapted = get_peft_model(model, updates)
    trained = [part for part in adapted.parameters() if part.requires_grad]
    loader = DataLoader(samples, BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    prompts = processor(text=domain.canonical_prompts, padding=True, return_tensors="pt")
    adapted.train()
    for epoch in range(EPOCHS):
        samples.set_epoch(epoch)
        for batch in loader:
            logits = adapted(**prompts, pixel_values=batch["images"]).logits_per_image  # (B, C)
            optimizer.zero_grad()
            cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            schedule.step()
    return adapted.merge_and_unload().eval(), processor
