"""What golden/mask_head.npz holds: the mask head alone, on inputs made from names and a seed.

Both sides, `embedded` here and Detectron2's in mask_golden_detectron2.py, answer `Inputs` with
the same names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from parity.cases import uniform

from detection.engines.embedded.mask_head import (
    MaskHead,
    crop_masks,
    encode_masks,
    mask_loss,
    paste_mask,
)

GOLDEN = Path(__file__).parent / "golden" / "mask_head.npz"
IN_CHANNELS, WIDTH, NUM_CONVS, NUM_CLASSES = 8, 6, 1, 3
NUM_REGIONS, SIDE = 6, 14
IMAGE = (37, 53)  # height, width
SEED = 7


def _numbers(name: str, *shape: int) -> np.ndarray:
    return uniform(f"mask head, {name}", SEED, int(np.prod(shape))).reshape(shape)


def _corners(name: str, scale: np.ndarray) -> np.ndarray:
    """Boxes [NUM_REGIONS, 4] float32; the first is thinner than 0.1 pixels."""
    corners = np.sort(_numbers(name, NUM_REGIONS, 2, 2) * 0.5 + 0.5, axis=1) * scale
    corners = corners.reshape(NUM_REGIONS, 4)
    corners[0, 2] = corners[0, 0] + 0.07
    return corners.astype(np.float32)


def _polygon(name: str, box: np.ndarray) -> np.ndarray:
    """Seven corners in the box and around it: float64 [14]."""
    corners = _numbers(name, 7, 2) * 0.8 + 0.5
    return (box[:2] + corners * (box[2:] - box[:2])).reshape(-1)


class Inputs:
    """Features, classes, ground truth and boxes of `NUM_REGIONS` regions of one image."""

    def __init__(self):
        scale = np.array(IMAGE[::-1], dtype=np.float64)
        self.features = torch.from_numpy(
            _numbers("features", NUM_REGIONS, IN_CHANNELS, 7, 7).astype(np.float32)
        )
        self.classes = torch.arange(NUM_REGIONS) % NUM_CLASSES
        self.boxes = torch.from_numpy(_corners("boxes", scale))
        self.polygons = [
            [_polygon(f"polygon {k} {part}", box) for part in range(1 + k % 2)]
            for k, box in enumerate(self.boxes.double().numpy())
        ]
        self.bitmasks = torch.from_numpy(_numbers("bit masks", NUM_REGIONS, *IMAGE) > -0.2)
        self.probabilities = torch.from_numpy(
            (_numbers("probabilities", NUM_REGIONS, SIDE, SIDE) * 0.5 + 0.5).astype(np.float32)
        )


def weights(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(0.5 * _numbers(name, *tensor.shape).astype(np.float32))
        for name, tensor in like.items()
    }


def named(
    *,
    initial: dict[str, torch.Tensor],
    rng_state: torch.Tensor,
    loss: torch.Tensor,
    gradients: dict[str, torch.Tensor],
    probabilities: torch.Tensor,
    targets: torch.Tensor,
    bitmask_targets: torch.Tensor,
    pasted: torch.Tensor,
    rle_counts: list[bytes],
) -> dict[str, np.ndarray]:
    """The arrays of the file; masks are packed eight pixels a byte."""
    digest = hashlib.sha256(rng_state.numpy().tobytes()).digest()
    out = {f"initial:{name}": tensor for name, tensor in initial.items()}
    out |= {f"gradient:{name}": tensor for name, tensor in gradients.items()}
    out |= {"loss": loss, "probabilities": probabilities}
    out = {name: tensor.detach().numpy() for name, tensor in out.items()}
    for name, mask in (
        ("targets", targets),
        ("bitmask_targets", bitmask_targets),
        ("pasted", pasted),
    ):
        out[name] = np.packbits(mask.numpy())
    out["rng_state_sha256"] = np.frombuffer(digest, np.uint8)
    out["rle_counts"] = np.frombuffer(b"\n".join(rle_counts), np.uint8)
    return out


def embedded() -> dict[str, np.ndarray]:
    """The embedded engine's answers."""
    given = Inputs()
    torch.manual_seed(SEED)
    head = MaskHead(IN_CHANNELS, width=WIDTH, num_convs=NUM_CONVS, num_masks=NUM_CLASSES)
    rng_state = torch.get_rng_state()
    initial = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(weights(head.state_dict()))
    index = torch.arange(NUM_REGIONS)
    targets = crop_masks(given.polygons, index, given.boxes, SIDE)
    features = given.features.requires_grad_()
    loss = mask_loss(head(features), given.classes, targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    pasted = [
        paste_mask(probs, box, *IMAGE)
        for probs, box in zip(given.probabilities, given.boxes, strict=True)
    ]
    rles = encode_masks(given.probabilities, given.boxes, *IMAGE)
    return named(
        initial=initial,
        rng_state=rng_state,
        loss=loss,
        gradients={**gradients, "features": features.grad},
        probabilities=head.probabilities(features, given.classes),
        targets=targets,
        bitmask_targets=crop_masks(given.bitmasks, index, given.boxes, SIDE),
        pasted=torch.stack(pasted),
        rle_counts=[rle["counts"] for rle in rles],
    )
