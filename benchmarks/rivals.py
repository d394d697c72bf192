"""Few-shot heads on frozen features: what else the base's features are worth.

Each takes features by split (N, F), labels by split (N,), and the base's text_embeds of the
canonical prompts (C, D); its settings are chosen on validation; gives logits by split (N, C).
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from nicheclip.evaluation.calibration import best_nll
from nicheclip.evaluation.probe import fit_probe, fit_strong_probe

Arrays = dict[str, np.ndarray]
Rival = Callable[[Arrays, Arrays, np.ndarray], Arrays]
EPOCHS = 300  # full batches
RATES = (1e-3, 1e-2)


def linear(embeds: Arrays, labels: Arrays, text_embeds: np.ndarray) -> Arrays:
    """Logistic regression on image_embeds."""
    of_train, judged = ((embeds[name], labels[name]) for name in ("train", "validation"))
    probe = fit_probe(of_train, judged, len(text_embeds))
    return {name: probe.logits(each) for name, each in embeds.items()}


def strong(features: Arrays, labels: Arrays, text_embeds: np.ndarray) -> Arrays:
    """LDA or logistic regression on pooled features, those of train of several views."""
    of_train, judged = ((features[name], labels[name]) for name in ("train", "validation"))
    probe = fit_strong_probe(of_train, judged, len(text_embeds))
    return {name: probe.logits(each) for name, each in features.items()}


def lp_plus_plus(embeds: Arrays, labels: Arrays, text_embeds: np.ndarray) -> Arrays:
    """LP++ (Huang et al. 2024, arXiv:2404.02285): class weights w_c + alpha_c t_c.

    The visual weights begin as class means, the text's share is learned for each class. AdamW takes
    the place of its step sizes.
    """
    text = torch.from_numpy(text_embeds)
    means = _class_means(embeds["train"], labels["train"], len(text))

    def begin(share: float) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
        weights = (10 * means).clone().requires_grad_()
        alphas = torch.full((len(text), 1), share).requires_grad_()
        return [weights, alphas], lambda images: images @ (weights + alphas * text).T

    return _trained(embeds, labels, begin, (1.0, 10.0, 50.0))


def tip_adapter_f(embeds: Arrays, labels: Arrays, text_embeds: np.ndarray) -> Arrays:
    """Tip-Adapter-F (Zhang et al. 2022, arXiv:2207.09519): a cache of training images as keys.

    The keys are trained; the share of the cache and its sharpness are chosen.
    """
    text, keys = torch.from_numpy(text_embeds), torch.from_numpy(embeds["train"])
    values = one_hot(torch.from_numpy(labels["train"]), len(text)).float()

    def begin(share: float) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
        trained = keys.clone().requires_grad_()

        def logits(images: torch.Tensor) -> torch.Tensor:
            affinity = images @ normalize(trained, dim=-1).T
            return 100 * images @ text.T + share * torch.exp(5.5 * (affinity - 1)) @ values

        return [trained], logits

    return _trained(embeds, labels, begin, (0.5, 2.0, 10.0))


def _class_means(embeds: np.ndarray, labels: np.ndarray, classes: int) -> torch.Tensor:
    images, own = torch.from_numpy(embeds), torch.from_numpy(labels)
    members = one_hot(own, classes).float()  # (N, C)
    return normalize(members.T @ images, dim=-1)


def _trained(embeds: Arrays, labels: Arrays, begin: Callable, shares: tuple[float, ...]) -> Arrays:
    """Full batches, the best of shares, rates and looks at validation."""
    images = {name: torch.from_numpy(each) for name, each in embeds.items()}
    own, tried = torch.from_numpy(labels["train"]), []
    for share, rate in product(shares, RATES):
        torch.manual_seed(0)
        parameters, logits = begin(share)
        optimizer = torch.optim.AdamW(parameters, rate)
        for epoch in range(1, EPOCHS + 1):
            optimizer.zero_grad()
            cross_entropy(logits(images["train"]), own).backward()
            optimizer.step()
            if epoch % (EPOCHS // 10) == 0:
                with torch.no_grad():
                    found = {name: logits(each).numpy() for name, each in images.items()}
                loss = best_nll(found["validation"], labels["validation"])
                tried.append((loss, len(tried), found))
    return min(tried)[2]
