"""The clients' data: sources and formats, partition, tokens, and batches for the ranks of a client."""

from deca_ds.data.batches import evaluation_batches, training_batches
from deca_ds.data.checks import validate_data_config
from deca_ds.data.client import ClientData, load_all, load_client_data, prepare_client_data, read_client_data

__all__ = [
    "ClientData",
    "evaluation_batches",
    "load_all",
    "load_client_data",
    "prepare_client_data",
    "read_client_data",
    "training_batches",
    "validate_data_config",
]
