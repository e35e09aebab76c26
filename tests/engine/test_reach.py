"""Parameters that a gradient does not reach, always or sometimes, on some ranks or on all, against torch's AdamW."""

import pytest
import torch
from jobs import launch
from reach_worker import DECAY, LR, STEPS, Model, rows
from safetensors.torch import load_file


def expected() -> dict[str, torch.Tensor]:
    """The same training in this process, a block at a time."""
    torch.manual_seed(0)
    model = Model()
    found, step = {}, 0
    for parts in ([model.embed], [model.layers], [model.tower, model.head]):
        block = [p for part in parts for p in part.parameters()]
        groups = [
            {"params": [p for p in block if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in block if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=LR)
        for _ in range(STEPS):
            model.zero_grad()
            ids = rows(step)
            logits = model(ids).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            squares = [p.grad.double().square().sum() for p in block if p.grad is not None]
            found[f"norm {step}"] = torch.stack(squares).sum().sqrt().float()
            adamw.step()
            step += 1
    return found | {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_no_gradient_reaches_is_left_alone(ranks, tmp_path):
    arguments = [str(tmp_path / "found.safetensors")]
    finished = launch("hand" if ranks > 1 else "python", ranks, arguments, script="tests/engine/reach_worker.py")
    assert finished.code == 0, finished.output[-4000:]
    found = load_file(arguments[0])
    never = [int(found.pop(f"never {index}")) for index in range(3)]
    assert never == [0, 2, 2]  # a weight in each layer, and the tower beside the head
    torch.manual_seed(0)
    start = dict(Model().named_parameters())
    wanted = expected()
    assert wanted.keys() == found.keys()
    for name, values in wanted.items():
        # where a gradient is near zero, rounding decides an Adam step of up to lr: compare what all steps come to
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, msg=name)
        if "unused" in name or "tower" in name:
            assert torch.equal(found[name], start[name]), name
        elif name in start:
            assert not torch.equal(found[name], start[name]), name
