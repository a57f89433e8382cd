"""Everything a detector computes, by name, from either engine; and the embedded engine's side.

A side (`Embedded` here, `Detectron2` in detectron2_side.py) says how to build its model and where
its quantities are; `observe` runs a phase of a case and returns {name: tensor}. The phases:

- detect: three images one by one and in one padded batch, in test mode.
- train: one forward and backward pass.
- steps: five SGD steps with warm-up.
- precise_bn: re-estimated batch-norm statistics from batches of unequal size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity.cases import NUM_CLASSES, NUM_STEPS, Case, config_pairs, make_batch, named_weights

from detection.config import load_detection_config
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.precise_bn import update_bn_statistics
from detection.engines.embedded.solver import build_optimizer, set_lr

Named = dict[str, torch.Tensor]


class Embedded:
    """The embedded engine. `changes` are settings on top of the case's (negative controls)."""

    def __init__(self, case: Case, changes: dict | None = None):
        self.cfg = load_detection_config(str(case.yaml), config_pairs(case, changes))
        self.model = build_model(self.cfg)
        self.model.load_state_dict(named_weights(self.model.state_dict(), case))

    def batch(self, samples: list[dict]) -> list[dict]:
        return samples

    def anchors(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def rpn_predictions(self, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, A] and deltas [B, A, 4]."""
        return output

    def proposals(self, output: tuple) -> list[torch.Tensor]:
        return output[0]

    def detections(self, output: list[dict]) -> list[tuple]:
        """Boxes, scores and classes of each image."""
        return [(found["boxes"], found["scores"], found["classes"]) for found in output]

    def watch_sampling(self, seen: Named) -> None:
        """Note sampled anchors and regions of each image in `seen`, from now on."""
        rpn, heads = self.model.proposal_generator, self.model.roi_heads
        label_anchors, sample_regions = rpn.label_anchors, heads.sample_regions

        def label(anchors, gt_boxes):
            labels, targets = label_anchors(anchors, gt_boxes)
            note_anchors(seen, labels, targets)
            return labels, targets

        def sample(proposals, gt_boxes, gt_classes):
            regions = sample_regions(proposals, gt_boxes, gt_classes)
            candidates = torch.cat([proposals, gt_boxes])
            note_regions(seen, candidates, regions.boxes, regions.classes, regions.targets)
            return regions

        rpn.label_anchors, heads.sample_regions = label, sample

    def run(self, batch: list[dict]):
        return self.model(batch)

    def start_training(self) -> Callable[[int], list[float]]:
        """A function that takes step k and gives the learning rates it used."""
        self.optimizer = build_optimizer(self.cfg, self.model)

        def step(index: int) -> list[float]:
            set_lr(self.optimizer, self.cfg, index)
            self.optimizer.step()
            return [group["lr"] for group in self.optimizer.param_groups]

        return step

    def update_bn(self, batches: list[list[dict]]) -> None:
        update_bn_statistics(self.model, batches, num_iters=len(batches))


def note_anchors(seen: Named, labels: torch.Tensor, targets: torch.Tensor) -> None:
    index = _next_index(seen, "anchor_labels")
    seen[f"anchor_labels.{index}"] = labels.long()
    seen[f"anchor_targets.{index}"] = targets[labels == 1]


def note_regions(
    seen: Named,
    candidates: torch.Tensor,
    boxes: torch.Tensor,
    classes: torch.Tensor,
    targets: torch.Tensor | None,
) -> None:
    """`targets` None: no ground truth. Where background is, targets mean nothing."""
    index = _next_index(seen, "sampled_index")
    same = (boxes[:, None] == candidates[None]).all(dim=2)
    foreground = classes != NUM_CLASSES
    seen[f"sampled_index.{index}"] = same.long().argmax(dim=1)
    seen[f"sampled_boxes.{index}"] = boxes
    seen[f"sampled_classes.{index}"] = classes
    seen[f"sampled_targets.{index}"] = boxes[:0] if targets is None else targets[foreground]


def _next_index(seen: Named, name: str) -> int:
    return sum(key.startswith(f"{name}.") for key in seen)


def observe(side, case: Case, phase: str) -> Named:
    """Run one phase on a fresh side. Tensors are detached copies."""
    seen = {"detect": _detect, "train": _train, "steps": _steps, "precise_bn": _precise_bn}[phase](
        side, case
    )
    return {name: value.detach().clone() for name, value in seen.items()}


def run_case(make_side: Callable, case: Case) -> Named:
    """All phases of a case, each on a fresh side and from the same seed."""
    seen: Named = {}
    for phase in case.phases:
        torch.manual_seed(case.seed)
        seen |= observe(make_side(), case, phase)
    return seen


def _watch(side, seen: Named) -> list:
    """Forward hooks that note what passes between the parts of the model; their handles."""
    model = side.model
    rpn, heads = model.proposal_generator, model.roi_heads

    def note_backbone(_, inputs, output):
        seen["padded_images"] = inputs[0]
        seen["res4"] = output["res4"]

    def note_anchor_grid(_, inputs, output):
        seen["anchors"] = side.anchors(output)

    def note_rpn_head(_, inputs, output):
        seen["objectness_logits"], seen["anchor_deltas"] = side.rpn_predictions(output)

    def note_proposals(_, inputs, output):
        for index, boxes in enumerate(side.proposals(output)):
            seen[f"proposals.{index}"] = boxes

    def note_res5(_, inputs, output):
        seen["res5"] = output

    def note_predictions(_, inputs, output):
        seen["class_logits"], seen["box_deltas"] = output

    hooked = (
        (model.backbone, note_backbone),
        (rpn.anchor_generator, note_anchor_grid),
        (rpn.rpn_head, note_rpn_head),
        (rpn, note_proposals),
        (heads.res5, note_res5),
        (heads.box_predictor, note_predictions),
    )
    return [module.register_forward_hook(hook) for module, hook in hooked]


def _detect(side, case: Case) -> Named:
    side.model.eval()
    everything: Named = {}
    for label, indices in (("0", (0,)), ("1", (1,)), ("2", (2,)), ("batch", (0, 1, 2))):
        seen: Named = {}
        hooks = _watch(side, seen)
        with torch.no_grad():
            found = side.detections(side.run(side.batch(make_batch(case, indices))))
        for hook in hooks:
            hook.remove()
        for index, (boxes, scores, classes) in enumerate(found):
            seen[f"boxes.{index}"] = boxes
            seen[f"scores.{index}"] = scores
            seen[f"classes.{index}"] = classes
        everything |= {f"detect/{label}/{name}": value for name, value in seen.items()}
    return everything


def _train(side, case: Case) -> Named:
    seen: Named = {}
    hooks = _watch(side, seen)
    side.watch_sampling(seen)
    seen |= _forward_and_backward(side, case, step=0)
    for hook in hooks:
        hook.remove()
    for name, parameter in side.model.named_parameters():
        if parameter.requires_grad:
            seen[f"gradient:{name}"] = parameter.grad
    for name, tensor in side.model.state_dict().items():
        if "running_" in name:
            seen[f"statistics:{name}"] = tensor
    seen["rng_state"] = torch.get_rng_state()
    return {f"train/{name}": value for name, value in seen.items()}


def _forward_and_backward(side, case: Case, step: int) -> Named:
    side.model.train()
    side.model.zero_grad()
    losses = side.run(side.batch(make_batch(case, step=step)))
    sum(losses.values()).backward()
    return losses


def _steps(side, case: Case) -> Named:
    take_step = side.start_training()
    seen: Named = {}
    for step in range(NUM_STEPS):
        losses = _forward_and_backward(side, case, step)
        seen |= {f"{name}.{step}": loss for name, loss in losses.items()}
        seen[f"learning_rates.{step}"] = torch.tensor(take_step(step), dtype=torch.float64)
    for name, tensor in side.model.state_dict().items():
        kind = "statistics" if "running_" in name or "num_batches" in name else "weight"
        seen[f"{kind}:{name}"] = tensor
    names = {parameter: name for name, parameter in side.model.named_parameters()}
    for parameter, state in side.optimizer.state.items():
        seen[f"momentum:{names[parameter]}"] = state["momentum_buffer"]
    seen["rng_state"] = torch.get_rng_state()
    return {f"steps/{name}": value for name, value in seen.items()}


def _precise_bn(side, case: Case) -> Named:
    parts = ((0, 1), (2,), (1, 2, 0))
    side.update_bn([side.batch(make_batch(case, part, step=k)) for k, part in enumerate(parts)])
    seen = {
        f"statistics:{name}": tensor
        for name, tensor in side.model.state_dict().items()
        if "running_" in name
    }
    seen["rng_state"] = torch.get_rng_state()
    return {f"precise_bn/{name}": value for name, value in seen.items()}
