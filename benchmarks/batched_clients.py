"""Would the simulator be faster if it computed all clients' gradients together?

    python benchmarks/batched_clients.py

The simulator computes one client after another. The other way is one computation with the parameters of all clients
stacked, by torch.func. It takes hand-made masks and positions, because transformers decides by values how to make its
own, and a batch with padding of its own in every client. The two ways alternate in this process, on one thread; a
figure is the lower quartile of CPU milliseconds for a gradient of each of eight clients. Prints a line a case and
writes benchmarks/results/batched_clients.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

CLIENTS, LAYERS, TARGETS, TIMES = 8, 4, 3, 12
RESULTS = Path(__file__).parent / "results" / "batched_clients.json"
CASES = [  # vocabulary, hidden size, examples a client, tokens an example
    (512, 64, 1, 32),
    (512, 64, 4, 64),
    (4096, 128, 4, 32),
    (4096, 128, 16, 32),
]


def case(vocabulary: int, hidden: int, rows: int, length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=LAYERS, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
    ids = torch.randint(0, vocabulary, (CLIENTS, rows, length))
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1).expand(rows, 1, length, length)
    inputs = {"attention_mask": mask, "position_ids": torch.arange(length)[None], "use_cache": False}
    parameters = dict(model.named_parameters())
    stacked = {
        name: torch.stack([p.detach() * (1 + 0.01 * client) for client in range(CLIENTS)])
        for name, p in parameters.items()
    }

    def loss(values: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits = functional_call(model, values, (), {"input_ids": tokens, **inputs}).logits[:, -TARGETS - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -TARGETS:].flatten())

    together_of = vmap(grad(loss))

    def together() -> dict[str, Tensor]:
        return together_of(stacked, ids)

    def in_turn() -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for client in range(CLIENTS):
            for name, parameter in parameters.items():
                parameter.data, parameter.grad = stacked[name][client], None
            loss(parameters, ids[client]).backward()
            for name, parameter in parameters.items():
                found[name].append(parameter.grad)
        return {name: torch.stack(parts) for name, parts in found.items()}

    apart = in_turn()
    off = max(float((apart[name] - part).abs().max() / part.abs().max()) for name, part in together().items())
    times: dict[str, list[float]] = {"in_turn": [], "together": []}
    for _ in range(TIMES):
        for name, action in (("in_turn", in_turn), ("together", together)):
            started = time.process_time()
            action()
            times[name].append(time.process_time() - started)
    found = {name: round(1e3 * sorted(taken)[TIMES // 4], 1) for name, taken in times.items()}
    ratio = round(found["together"] / found["in_turn"], 2)
    about = {"vocabulary": vocabulary, "hidden": hidden, "examples": rows, "tokens": length}
    return about | {"cpu_ms": found, "ratio": ratio, "relative_difference": off}


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for sizes in CASES:
        found.append(case(*sizes))
        print(json.dumps(found[-1]), flush=True)
    RESULTS.write_text(json.dumps({"clients": CLIENTS, "layers": LAYERS, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
