"""What a run says, and writes, when NaN or Inf stops it; and the check of what is saved."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch

from moco.data.images import ImageSource
from moco.distributed import ProcessInfo, any_rank, gather_objects
from moco.errors import NonFiniteError
from moco.methods import Method
from moco.training import checkpoint as ckpt
from moco.training.guard import FINDINGS, Evidence
from moco.training.identity import RunIdentity

_SHOWN_IMAGES = 8


@dataclass(frozen=True)
class RankReport:
    """Of one process: what is not finite in it, and the images of its step."""

    rank: int
    findings: list[str]
    indices: list[int]
    names: list[str]


class NonFiniteReport:
    """Explains a step that is not finite, on all processes together, and raises.

    With `output_dir`, rank 0 writes `nonfinite_step_N.pt` there (weights_only): what is needed to
    make the step's batch again, since a view depends on (seed, epoch, image) alone.

    Args:
        source, output_dir, identity: of the run; None leaves file names, the replay file and the
            last checkpoint out.
    """

    def __init__(
        self,
        method: Method,
        process: ProcessInfo,
        *,
        source: ImageSource | None = None,
        output_dir: Path | None = None,
        identity: RunIdentity | None = None,
    ):
        self.method, self.process = method, process
        self.source, self.output_dir, self.identity = source, output_dir, identity

    def __call__(self, evidence: Evidence, named: frozenset[str]) -> NoReturn:
        """Raises: NonFiniteError, one line with step, ranks, findings, images and remedy."""
        reports = gather_objects(self._own(evidence, named))
        where = ""
        if self.output_dir is not None:
            where = _from_main(self._write_replay(evidence, named, reports))
        blamed = [report for report in reports if report.findings]
        ranks = ", ".join(str(report.rank) for report in blamed) or "none alone"
        details = "; ".join(dict.fromkeys(f for report in blamed for f in report.findings))
        shown = (blamed or reports)[0]
        names = shown.names or [""] * len(shown.indices)
        images = [
            f"{index} ({name})" if name else str(index)
            for index, name in list(zip(shown.indices, names, strict=True))[:_SHOWN_IMAGES]
        ]
        dots = ", ..." if len(shown.indices) > _SHOWN_IMAGES else ""
        raise NonFiniteError(
            f"step {evidence.step}: {next(f for f in FINDINGS if f in named)} not finite "
            f"(rank {ranks}: {details or 'only their sum'}; lr={evidence.lr:.6g}); "
            f"nothing was updated with it. Images of rank {shown.rank}: "
            f"{', '.join(images)}{dots}. {where}Lower TRAIN.LR, or look at these images"
        )

    def _own(self, evidence: Evidence, named: frozenset[str]) -> RankReport:
        state = {
            **dict(self.method.named_parameters()),
            **dict(self.method.named_buffers(recurse=False)),
        }
        findings = [f"{name} itself" for name in not_finite_names(state)]
        loss = evidence.loss.item()
        if named != {FINDINGS[2]}:
            if not torch.isfinite(evidence.loss):
                findings.append(f"loss={loss}")
            if evidence.keys_VBD is not None:
                bad = ~torch.isfinite(evidence.keys_VBD).all(-1)
                if bad.any():
                    findings.append(f"{int(bad.sum())} of {bad.numel()} keys")
        else:
            # Gradients are shared by now; whose images they come from, only a second pass tells.
            evidence.redo()
            gradients = {n: p.grad for n, p in self.method.named_parameters() if p.grad is not None}
            bad = not_finite_names(gradients)
            if bad:
                findings.append(f"gradient of {_listed(bad)}, loss={loss:.6g}")
        indices = evidence.index_B.tolist()
        names = [self.source.paths[index] for index in indices] if self.source else []
        return RankReport(self.process.rank, findings, indices, names)

    def _write_replay(
        self, evidence: Evidence, named: frozenset[str], reports: list[RankReport]
    ) -> str:
        """On rank 0: the file, and the sentences about it and the last checkpoint."""
        if not self.process.is_main:
            return ""
        identity = self.identity
        content = {
            "step": evidence.step,
            "epoch": evidence.step // identity.steps_per_epoch,
            "lr": evidence.lr,
            "seed": identity.config["SEED"],
            "not_finite": sorted(named),
            "config_digest": identity.config_digest,
            "data_digest": identity.data_digest,
            "world_size": identity.world_size,
            "ranks": [asdict(report) for report in reports],
        }
        path = self.output_dir / f"nonfinite_step_{evidence.step}.pt"
        data = io.BytesIO()
        torch.save(content, data)
        ckpt.write_atomic(path, lambda file: file.write(data.getbuffer()))
        last, manifest, _ = ckpt.latest_verified(self.output_dir)
        good = "There is no checkpoint yet. "
        if last is not None:
            good = f"Last good checkpoint: {last} (after {manifest['step']} steps), for --resume. "
        return f"Their list: {path}. {good}"


def check_state_is_finite(
    method: Method, optimizer: torch.optim.Optimizer, what: str, process: ProcessInfo
) -> None:
    """Look at all weights, buffers and the optimizer's state before they are saved.

    Args:
        what: where in training, for the message.
    Raises: NonFiniteError on all processes, where one holds NaN or Inf.
    """
    state = dict(method.state_dict())
    for number, entry in enumerate(optimizer.state.values()):
        state.update({f"optimizer.{number}.{n}": t for n, t in entry.items()})
    bad = not_finite_names(state)
    if any_rank(bool(bad), process.device):
        found = [(rank, names) for rank, names in enumerate(gather_objects(bad)) if names]
        listed = "; ".join(f"rank {rank}: {_listed(names)}" for rank, names in found)
        raise NonFiniteError(
            f"{what}: weights or state are not finite ({listed}), so no checkpoint was written; "
            "continue from the last one with --resume"
        )


def not_finite_names(tensors: Mapping[str, object]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or Inf."""
    floats = {
        name: t.detach()
        for name, t in tensors.items()
        if torch.is_tensor(t) and t.is_floating_point() and t.numel()
    }
    if not floats:
        return []
    # One number each, of a device read together; a sum is many times faster than isfinite, and as
    # sure but for an overflow, so those it points at are looked at again. float16's sums overflow.
    odd_of: dict[str, bool] = {}
    for kind in {(t.device, t.dtype) for t in floats.values()}:
        alike = {name: t for name, t in floats.items() if (t.device, t.dtype) == kind}
        sums = torch.stack([t.sum() for t in alike.values()])
        odd_of.update(zip(alike, (~torch.isfinite(sums)).tolist(), strict=True))
    suspects = ((item, odd_of[item[0]]) for item in floats.items())
    return [name for (name, t), odd in suspects if odd and not torch.isfinite(t).all()]


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def _from_main(own: object) -> object:
    return gather_objects(own)[0]
