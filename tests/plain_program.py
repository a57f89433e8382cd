"""A program that knows nothing of this project: what it finds in files, and one step of SGD.

    python plain_program.py '{"odd": [FILE, ...], "step": [FILE, ...]}'

Run by path, outside the repository. Prints JSON: for each file of "odd" what is unusual in it; for
each of "step" the parameters that torch's SGD, made as main_moco.py makes it and loaded from the
file, moves elsewhere than its formula does.
"""

import json
import pickle
import sys

import torch

ALLOWED = ("torch.float32", "torch.int64")


def load(path):
    if path.endswith(".pkl"):
        with open(path, "rb") as file:
            return pickle.load(file)  # numpy arrays, as Detectron2 reads them
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def oddities(part, at=""):
    if isinstance(part, dict):
        if part.get("fused") is not None:
            yield f"{at}.fused is {part['fused']}"
        for name, value in part.items():
            yield from oddities(value, f"{at}.{name}")
    elif isinstance(part, list | tuple):
        for i, value in enumerate(part):
            yield from oddities(value, f"{at}.{i}")
    elif torch.is_tensor(part):
        plain = torch.empty(part.shape, dtype=part.dtype)
        if part.stride() != plain.stride():
            yield f"{at} has strides {part.stride()}"
        is_hash = at.startswith(".extra.seen_images.") and part.dtype == torch.uint8
        if str(part.dtype) not in ALLOWED and not is_hash:
            yield f"{at} is {part.dtype}"
        if part.device.type != "cpu" or part.requires_grad:
            yield f"{at} is on {part.device}, requires_grad {part.requires_grad}"
        if part.untyped_storage().nbytes() != part.numel() * part.element_size():
            yield f"{at} is part of a larger storage"
    elif hasattr(part, "__array_interface__") and getattr(part, "ndim", 0):
        if not part.flags.c_contiguous or str(part.dtype) not in ("float32", "int64"):
            yield f"{at} is {part.dtype}, {part.strides}"


def moved_elsewhere(path):
    content = torch.load(path, weights_only=True)
    buffers = ("queue", "queue_ptr", "running_mean", "running_var", "num_batches_tracked")
    state = {n: t for n, t in content["state_dict"].items() if not n.endswith(buffers)}
    # Copied into a model's own tensors, as load_state_dict does.
    weights = {n: torch.nn.Parameter(torch.empty(t.shape).copy_(t)) for n, t in state.items()}
    optimizer = torch.optim.SGD(weights.values(), 0.1, momentum=0.9, weight_decay=1e-4)
    optimizer.load_state_dict(content["optimizer"])
    [group] = optimizer.param_groups
    torch.manual_seed(0)
    wanted = {}
    for number, (name, weight) in enumerate(weights.items()):
        saved = content["optimizer"]["state"].get(number)
        if saved is None:  # the key encoder's have no gradient
            continue
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape)
        moment = 0.9 * saved["momentum_buffer"] + weight.grad + 1e-4 * before
        wanted[name] = before - group["lr"] * moment
    assert wanted and group["lr"] > 0
    optimizer.step()
    return [n for n, t in wanted.items() if not torch.allclose(weights[n], t, rtol=1e-4, atol=1e-6)]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = {path: list(oddities(load(path))) for path in asked.get("odd", ())}
    found.update({f"step {path}": moved_elsewhere(path) for path in asked.get("step", ())})
    found["modules"] = [name for name in ("moco", "detection") if name in sys.modules]
    print(json.dumps(found))
