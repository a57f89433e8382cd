"""Detectron2's side of `observed.observe`: its model, trainer parts and precise batch norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import get_cfg
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from parity.cases import Case, config_pairs, named_weights
from parity.observed import Named, note_anchors, note_regions

if "Res5ROIHeadsExtraNorm" not in ROI_HEADS_REGISTRY:

    @ROI_HEADS_REGISTRY.register(None)
    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        """MoCo v1, appendix A.3: one more norm at the end of res5."""

        @classmethod
        def _build_res5_block(cls, cfg):
            res5, num_channels = super()._build_res5_block(cfg)
            res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, num_channels))
            return res5, num_channels


class Detectron2:
    """The same members as `observed.Embedded`."""

    def __init__(self, case: Case):
        self.cfg = get_cfg()
        self.cfg.merge_from_file(str(case.yaml))
        self.cfg.merge_from_list(config_pairs(case))
        self.model = build_model(self.cfg)
        self.model.load_state_dict(named_weights(self.model.state_dict(), case))

    def batch(self, samples: list[dict]) -> list[dict]:
        converted = []
        for sample in samples:
            instances = Instances(tuple(sample["image"].shape[-2:]))
            instances.gt_boxes = Boxes(sample["gt_boxes"])
            instances.gt_classes = sample["gt_classes"]
            kept = {key: sample[key] for key in ("image", "height", "width")}
            converted.append({**kept, "instances": instances})
        return converted

    def anchors(self, output: list[Boxes]) -> torch.Tensor:
        return Boxes.cat(output).tensor

    def rpn_predictions(self, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        (logits,), (deltas,) = output  # [B, A, H, W] and [B, 4 A, H, W] of the one level
        deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        return logits.permute(0, 2, 3, 1).flatten(1), deltas

    def proposals(self, output: tuple) -> list[torch.Tensor]:
        return [instances.proposal_boxes.tensor for instances in output[0]]

    def detections(self, output: list[dict]) -> list[tuple]:
        found = [result["instances"] for result in output]
        return [(f.pred_boxes.tensor, f.scores, f.pred_classes) for f in found]

    def watch_sampling(self, seen: Named) -> None:
        rpn, heads = self.model.proposal_generator, self.model.roi_heads
        label_anchors, sample_proposals = (
            rpn.label_and_sample_anchors,
            heads.label_and_sample_proposals,
        )

        def label(anchors, gt_instances):
            labels, targets = label_anchors(anchors, gt_instances)
            for one_image in zip(labels, targets, strict=True):
                note_anchors(seen, *one_image)
            return labels, targets

        def sample(proposals, gt_instances):
            sampled = sample_proposals(proposals, gt_instances)
            for given, truth, kept in zip(proposals, gt_instances, sampled, strict=True):
                candidates = torch.cat([given.proposal_boxes.tensor, truth.gt_boxes.tensor])
                targets = kept.gt_boxes.tensor if kept.has("gt_boxes") else None
                note_regions(
                    seen, candidates, kept.proposal_boxes.tensor, kept.gt_classes, targets
                )
            return sampled

        rpn.label_and_sample_anchors = label
        heads.label_and_sample_proposals = sample

    def run(self, batch: list[dict]):
        with EventStorage():
            return self.model(batch)

    def start_training(self) -> Callable[[int], list[float]]:
        self.optimizer = build_optimizer(self.cfg, self.model)
        scheduler = build_lr_scheduler(self.cfg, self.optimizer)

        def step(index: int) -> list[float]:
            used = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.step()
            scheduler.step()
            return used

        return step

    def update_bn(self, batches: list[list[dict]]) -> None:
        self.model.train()
        with EventStorage():
            update_bn_stats(self.model, batches, num_iters=len(batches))
