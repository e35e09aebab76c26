"""DECA as pure rules on tensors: blocks, their schedule, the local step, the consensus-derived signal.

The method is that of "DECA: Decentralizing Block-Wise Adam for Efficient LLM Full-Parameter Fine-Tuning on Non-IID
Data", arXiv 2606.03209. Nothing here knows of processes, files or DeepSpeed.
"""
