"""Two gloo processes: shuffle BN, gathering, equal states, and what equals one process."""

import signal

import pytest
import tiny
import torch
import torch.nn.functional as F
from processes import in_processes

from moco import distributed
from moco.contrast.info_nce import info_nce_logits, info_nce_loss
from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.errors import DistributedError
from moco.methods.moco import MoCo
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer


def _shuffle(rank):
    images = torch.arange(4.0)[:, None] + 10 * rank
    permutation = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    shuffled = distributed.batch_shuffle(images, permutation)
    return images, shuffled, distributed.batch_unshuffle(shuffled, permutation), permutation


def test_shuffle_permutes_across_processes_and_unshuffle_undoes_it(tmp_path):
    ranks = in_processes(_shuffle, tmp_path)
    everything = torch.cat([images for images, *_ in ranks])
    shuffled = torch.cat([s for _, s, _, _ in ranks])
    assert torch.equal(shuffled, everything[ranks[0][3]])
    for images, own, restored, _ in ranks:
        assert torch.equal(restored, images)
        assert not torch.equal(own, images)  # negative control: something did move
    assert (ranks[0][1] >= 10).any() and (ranks[1][1] < 10).any()  # between processes too


def _statistics(rank, shuffle):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3)
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(rank)) + rank
    if shuffle:
        permutation = torch.randperm(8, generator=torch.Generator().manual_seed(3))
        images = distributed.batch_shuffle(images, permutation)
    norm(images)
    return norm.running_mean


def test_statistics_really_differ_between_query_and_shuffled_key_batches(tmp_path):
    plain = in_processes(_statistics, tmp_path, False)
    shuffled = in_processes(_statistics, tmp_path, True)
    for rank in range(2):
        assert not torch.allclose(plain[rank], shuffled[rank], atol=1e-3)
    torch.testing.assert_close(sum(plain), sum(shuffled))  # the same images in total


class NormFree(torch.nn.Module):
    """An encoder without batch norm, so that the number of processes cannot matter."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(6, 8)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def _norm_free_method():
    torch.manual_seed(0)
    method = MoCo(arch="resnet18", dim=8, mlp=False, queue_size=24, temperature=0.2, width=0.125)
    torch.manual_seed(1)
    method.encoder_q, method.encoder_k = NormFree().double(), NormFree().double()
    method.encoder_k.load_state_dict(method.encoder_q.state_dict())
    method.encoder_k.requires_grad_(False)
    return method.double()


def _train_norm_free(rank, world_size, num_steps=5):
    method = _norm_free_method()
    model = method
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), 0.1, momentum=0.9)
    losses, share = [], 8 // world_size
    for step in range(num_steps):
        draws = torch.Generator().manual_seed(step)
        views = torch.randn(2, 8, 3, 6, 6, generator=draws, dtype=torch.float64)
        own = views[:, rank * share : (rank + 1) * share]
        index = torch.arange(share)
        output = model(own[0], own[1], index, momentum=0.9, generator=draws)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output, index)
        losses.append(output.loss.detach())
    return torch.stack(losses), dict(method.state_dict())


def test_two_processes_of_4_equal_one_of_8_without_batch_norm(tmp_path):
    first, second = in_processes(_train_norm_free, tmp_path, 2)
    losses, state = _train_norm_free(0, 1)
    torch.testing.assert_close((first[0] + second[0]) / 2, losses, rtol=1e-5, atol=1e-6)
    for name, tensor in state.items():
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(first[1][name], second[1][name])
    # Negative control: one step less is another state.
    other = _train_norm_free(0, 1, num_steps=4)[1]
    assert not torch.allclose(other["queue"], state["queue"], atol=1e-3)


def _train(rank, images, folder):
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    trainer = Trainer(
        tiny.config(TRAIN__EPOCHS=2), find_images(images), folder, process, say=lambda line: None
    )
    trainer.train()
    # Batch-norm statistics are each process's own, as in the reference; all else is equal.
    state = trainer.method.state_dict()
    shared = {n: t for n, t in state.items() if "running" not in n and "tracked" not in n}
    distributed.check_equal_across_ranks(shared, "after training", process.device)
    return shared


def test_both_processes_hold_the_same_queue_and_weights(image_folder, tmp_path):
    first, second = in_processes(_train, tmp_path, image_folder, tmp_path / "run")
    assert {"queue", "queue_ptr", "encoder_q.conv1.weight", "encoder_k.fc.2.bias"} <= first.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    content = ckpt.read_torch_file(tmp_path / "run" / "checkpoint_0001.pth.tar")
    assert torch.equal(content["state_dict"]["module.queue"], first["queue"])


class _StopRank1:
    """SIGTERM to one of the two processes only."""

    def __init__(self, rank):
        self.rank = rank

    def on_step(self, record):
        if record.step == 3 and self.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_epoch(self, record):
        pass


def _stop_and_resume(rank, images, folder):
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))

    def trainer(name):
        return Trainer(
            tiny.config(TRAIN__EPOCHS=2), find_images(images), folder / name, process,
            resume=True, say=lambda line: None,
        )  # fmt: skip

    code = trainer("stopped").train([_StopRank1(rank)])
    resumed = trainer("stopped")
    first_step, whole = resumed.first_step, trainer("whole")
    resumed.train()
    whole.train()
    same = all(
        torch.equal(a, b)
        for (name, a), b in zip(
            resumed.method.state_dict().items(), whole.method.state_dict().values(), strict=True
        )
        if rank == 0 or "running" not in name
    )
    return code, first_step, same


def test_a_signal_to_one_process_stops_both_at_one_step_and_resumes_exactly(image_folder, tmp_path):
    ranks = in_processes(_stop_and_resume, tmp_path, image_folder, tmp_path / "runs")
    assert ranks == [(128 + signal.SIGTERM, 4, True)] * 2


def _drift(rank, images, folder):
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    trainer = Trainer(
        tiny.config(TRAIN__EPOCHS=1), find_images(images), folder, process, say=lambda line: None
    )
    with torch.no_grad():  # as a flipped bit or a skipped collective would
        trainer.method.encoder_q.conv1.weight[0, 0, 0, 0] += 1e-3 * rank
    with pytest.raises(DistributedError, match="step 4: .*on rank 0 .*on rank 1 .*conv1.weight"):
        trainer.train()
    return True


def test_a_rank_whose_state_drifts_stops_the_job_before_the_checkpoint(image_folder, tmp_path):
    assert in_processes(_drift, tmp_path, image_folder, tmp_path / "run") == [True, True]
    assert ckpt.checkpoint_files(tmp_path / "run") == []


def _differ(rank):
    state = {"x": torch.zeros(3)}
    device = torch.device("cpu")
    distributed.check_equal_across_ranks(state, "step 1", device)
    state["x"][1] = 1e-30 * rank
    with pytest.raises(DistributedError, match="step 2: .*on rank 0 .*on rank 1 .*in x"):
        distributed.check_equal_across_ranks(state, "step 2", device)
    return distributed.any_rank(rank == 1, device)


def test_a_rank_that_differs_is_named(tmp_path):
    assert in_processes(_differ, tmp_path) == [True, True]


def test_logits_of_two_halves_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    q, k = F.normalize(torch.randn(2, 8, 4, generator=generator), dim=2)
    queue = F.normalize(torch.randn(4, 9, generator=generator), dim=0)
    halves = [info_nce_loss(info_nce_logits(q[s], k[s], queue, 0.2))
              for s in (slice(0, 4), slice(4, 8))]  # fmt: skip
    torch.testing.assert_close(sum(halves) / 2, info_nce_loss(info_nce_logits(q, k, queue, 0.2)))
