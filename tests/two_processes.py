"""python -m torch.distributed.run --nproc_per_node 2 tests/two_processes.py OUT.safetensors

Gradients of every loss on a tiny CLIPModel, each process with its own slice of one batch;
`tests/test_losses.py` runs it and compares them with those of a single process.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPConfig, CLIPModel

from nicheclip.training.losses import LOSSES, gather

BATCH, CLASSES = 8, 5
TOWER = {"hidden_size": 16, "intermediate_size": 32}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_model() -> CLIPModel:
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 32, "max_position_embeddings": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = TOWER | {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def joint_batch() -> dict[str, torch.Tensor]:
    """Pixels (B, 3, 16, 16), prompts of images (B, 6) and classes (C, 6), labels (B,)."""
    draw = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(BATCH, 3, 16, 16, generator=draw),
        "own_prompts": torch.randint(3, 32, (BATCH, 6), generator=draw),
        "class_prompts": torch.randint(3, 32, (CLASSES, 6), generator=draw),
        "labels": torch.tensor([0, 0, 1, 1, 2, 0, 3, 4]),
    }


def gradients(
    loss: str, forward, model: CLIPModel, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of all parameters; `forward` is the model, or what wraps it."""
    model.zero_grad()
    prompts = batch["class_prompts"] if loss == "class_prompts" else batch["own_prompts"]
    outputs = forward(input_ids=prompts, pixel_values=batch["pixel_values"])
    image_embeds, text_embeds, labels = outputs.image_embeds, outputs.text_embeds, batch["labels"]
    if loss != "class_prompts":
        image_embeds, text_embeds = gather(image_embeds), gather(text_embeds)
        labels = gather(labels)
    logits_per_image = model.logit_scale.exp() * image_embeds @ text_embeds.T
    LOSSES[loss](logits_per_image, labels, 0.1).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def of_this_process() -> dict[str, torch.Tensor]:
    """Gradients by loss, what DistributedDataParallel is told of unused ones, and parameter."""
    batch = joint_batch()
    for name in ("pixel_values", "own_prompts", "labels"):
        batch[name] = batch[name].chunk(distributed.get_world_size())[distributed.get_rank()]
    model, found = tiny_model(), {}
    wrapped = DistributedDataParallel(model)
    for loss in LOSSES:
        for name, gradient in gradients(loss, wrapped, model, batch).items():
            found[f"{loss}/{name}"] = gradient
    return found


def main(out: str) -> None:
    distributed.init_process_group("gloo")
    # its wrapped models are gone by now: freed after their group, they can hang
    found = of_this_process()
    if distributed.get_rank() == 0:
        save_file(found, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
