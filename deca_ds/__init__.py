"""Decentralized block-wise Adam (DECA) for full-parameter fine-tuning on DeepSpeed ZeRO-3 clients."""

__version__ = "0.1.0"
