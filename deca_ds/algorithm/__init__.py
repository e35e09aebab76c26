"""DECA as pure rules on tensors: blocks, their schedule, the local step, the consensus-derived signal.

The method is that of "DECA: Decentralizing Block-Wise Adam for Efficient LLM Full-Parameter Fine-Tuning on Non-IID
Data", arXiv 2606.03209. Nothing here knows of processes, files or DeepSpeed.
"""

from deca_ds.algorithm.blocks import (
    Block,
    BlockPlan,
    find_layers,
    fused_parameters,
    parameter_shapes,
    split_into_blocks,
)
from deca_ds.algorithm.deca import SIGNALS
from deca_ds.algorithm.local import LocalSteps, local_step
from deca_ds.algorithm.methods import METHODS, Method, build_rule
from deca_ds.algorithm.norms import squared_norm
from deca_ds.algorithm.rule import Rule, State
from deca_ds.algorithm.schedule import Schedule, Step, learning_rate

__all__ = [
    "METHODS",
    "SIGNALS",
    "Block",
    "BlockPlan",
    "LocalSteps",
    "Method",
    "Rule",
    "Schedule",
    "State",
    "Step",
    "build_rule",
    "find_layers",
    "fused_parameters",
    "learning_rate",
    "local_step",
    "parameter_shapes",
    "split_into_blocks",
    "squared_norm",
]
