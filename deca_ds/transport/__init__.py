"""Messages between ranks of different clients over MPI, gloo or threads, and who sends which elements to whom."""

from deca_ds.transport.checksums import Exchange
from deca_ds.transport.chunks import exchange_chunk
from deca_ds.transport.collectives import all_reduce_sum, barrier, gather_json, sum_slices
from deca_ds.transport.commit import Commit, Result
from deca_ds.transport.edges import probe_edges, save_edges
from deca_ds.transport.gloo import GlooTransport, TorchExchange
from deca_ds.transport.intersections import Chunk
from deca_ds.transport.mpi import MpiExchange, MpiTransport
from deca_ds.transport.polling import poll
from deca_ds.transport.transport import HANDOVER_TAG, Endpoint, Transport, chunk_tag

__all__ = [
    "HANDOVER_TAG",
    "Chunk",
    "Commit",
    "Endpoint",
    "Exchange",
    "GlooTransport",
    "MpiExchange",
    "MpiTransport",
    "Result",
    "TorchExchange",
    "Transport",
    "all_reduce_sum",
    "barrier",
    "chunk_tag",
    "exchange_chunk",
    "gather_json",
    "poll",
    "probe_edges",
    "save_edges",
    "sum_slices",
]
