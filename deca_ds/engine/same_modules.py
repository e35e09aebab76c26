"""Whether a model calls the same modules, in the same order, for all data.

ZeRO-3 gathers a module's parameters when the module is called, and ahead of that as it has seen earlier calls follow
each other, those of modules without parameters included. Ranks whose data choose other modules would gather different
parameters: they would mix them up, or wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from deca_ds.engine import internals
from deca_ds.errors import ModelError


class SameModules:
    """Sees to it that every forward pass calls the modules that the first one of its kind has called, in its order.

    The first pass has to be of the same rows on all ranks of the client; then no rank differs from another one, without
    any communication. Inside a module that ZeRO-3 gathers as a whole the calls may be others.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._first: dict[str, list[str]] = {}  # calls of the first pass, by kind
        self._expected: list[str] | None = None  # in this pass; None in the first one
        self._called: list[str] | None = None  # so far; None between passes
        whole = tuple(f"{name}." for name, module in model.named_modules() if internals.is_leaf(module))
        for name, module in model.named_modules():
            if not name.startswith(whole):
                module.register_forward_pre_hook(lambda *_, name=name: self._note(name), prepend=True)

    @contextmanager
    def watched(self, kind: str) -> Iterator[None]:
        """Watch a forward pass. kind: of passes that call the same modules.

        Raises ModelError before the first call that is another one than in the first pass, and so before ZeRO-3 gathers
        anything for it, or after a pass that has left out the last ones.
        """
        called = self._called = list[str]()
        expected = self._expected = self._first.get(kind)
        try:
            yield
        finally:
            self._called = None
        if expected is None:
            self._first[kind] = called
        elif len(called) < len(expected):
            raise self._refused(expected[len(called)])

    def _note(self, name: str) -> None:
        """Note that the module is about to be called."""
        called, expected = self._called, self._expected
        if called is None:  # in the backward pass a layer may be called again, to recompute its activations
            return
        if expected is not None:
            due = expected[len(called)] if len(called) < len(expected) else None
            if name != due:
                # one that is missing, or one that is there more often
                raise self._refused(name if due is None or called.count(name) >= expected.count(name) else due)
        called.append(name)

    def _refused(self, name: str) -> ModelError:
        return ModelError(
            f"{type(self._model).__name__} runs {name} for some data only, or more often or earlier: the ranks of a "
            "client, whose data differ, would mix up their parts of the parameters",
            where="model.path",
            fix="give each client one rank, keep what a layer chooses from in a list of modules in that layer, or use "
            "another model",
        )
