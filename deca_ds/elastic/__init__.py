"""Clients that die and rejoin: agreements on the members, the failure policy, new connections, and the handover."""

from deca_ds.elastic.agent import ElasticAgent
from deca_ds.elastic.invitation import Invitation
from deca_ds.elastic.network_partition import Lookout
from deca_ds.elastic.policy import check_absent
from deca_ds.elastic.quorum_client import QuorumClient, open_votes
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.reconnect_ulfm import ReconnectingUlfm
from deca_ds.elastic.rejoin import Rejoin, join_job, save_addresses
from deca_ds.elastic.survivor_commit import Question, SurvivorCommit

__all__ = [
    "ElasticAgent",
    "Invitation",
    "Lookout",
    "Question",
    "QuorumClient",
    "ReconnectingGloo",
    "ReconnectingUlfm",
    "Rejoin",
    "SurvivorCommit",
    "check_absent",
    "join_job",
    "open_votes",
    "save_addresses",
]
