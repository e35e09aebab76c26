"""How fast a graph averages, by theory: what a plan can say about consensus before anything runs.

rho = 1 - spectral gap is the factor by which one averaging shrinks the clients' distance to their mean, at least; see
weights.spectral_gap.
"""

from __future__ import annotations

import math

from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.plural import several

# Of the standard deviation of freshly drawn weights: a disagreement as large as this is no small perturbation.
LARGE_DISAGREEMENT = 0.5
_CLOSER = 1.5  # what one period does is told by itself from this factor on


def averagings_to_agree(mixing: MixingSchedule) -> float:
    """Return the averagings after which a disagreement is smaller by a factor of e = 2.718, or more: -1 / ln(1 - gap).

    At least one period of the schedule; infinite for gap 0.
    """
    gap = mixing.spectral_gap
    if gap <= 0:
        return math.inf
    return max(float(mixing.period), 0.0 if gap >= 1 else -1.0 / math.log1p(-gap))


def agreement(mixing: MixingSchedule, adds: str = "") -> str:
    """Say what averagings do to the clients' models, for the plan and the start of a run. adds: see Rule."""
    if mixing.size == 1:
        return "one client averages with nobody"
    if mixing.messages == 0:
        return "every client trains alone, and the models drift apart"
    return (f"without the {adds} that the method adds, " if adds else "") + _of_plain_averagings(mixing)


def _of_plain_averagings(mixing: MixingSchedule) -> str:
    gap, period = mixing.spectral_gap, mixing.period
    if gap <= 0:
        return "averaging over a period need not bring the clients' models closer together"
    often = "every averaging" if period == 1 else f"every {period} averagings"
    if gap >= 1:
        same = f"after {often} all clients have the same block"
        if period > 1:
            return f"{same}, but for what their local steps in between have changed"
        return (
            f"{same}, as with a server that averages all of them; for clients that keep models of their own set "
            "gossip.graph=ring gossip.weights=lazy_metropolis"
        )
    closer = (1 - gap) ** -period
    if closer < _CLOSER:
        often, closer = f"about {averagings_to_agree(mixing):.3g} averagings", math.e
    does = "brings" if often == "every averaging" else "bring"
    return f"{often} {does} the clients' models {closer:.1f} times closer together, or more"


def predicted_disagreement(mixing: MixingSchedule, lr: float, local_steps: int) -> float:
    """Return how far apart a weight of different clients stays after a period, per coordinate, with s local steps from
    one averaging to the next: e* = (sigma + tau - 1) s lr / (1 - sigma).

    Adam moves a coordinate by about lr at most (Kingma and Ba, arXiv 1412.6980, section 2.1). A period of tau
    averagings leaves at most sigma = (1 - spectral gap)^tau of the disagreement that it meets, and at most all of the
    steps in its midst: it takes e to at most sigma (e + s lr) + (tau - 1) s lr, of which e* is the fixed point. The
    same balance of drift and spectral gap bounds the consensus distance of local SGD (Koloskova et al., arXiv
    2003.10422). An upper estimate: clients that move the same way disagree less. Infinite for gap 0.
    """
    gap, tau = mixing.spectral_gap, mixing.period
    sigma = (1 - gap) ** tau
    return math.inf if gap <= 0 else (sigma + tau - 1) * local_steps * lr / (1 - sigma)


def slow_mixing(
    mixing: MixingSchedule, *, inner_steps: int, gossip_every: int, lr: float, weight_scale: float
) -> list[str]:
    """Warn, in whole sentences, if the graph mixes too slowly for inner_steps or for lr; empty if it does not.

    weight_scale: standard deviation of the model's freshly drawn weights. Clients that do not gossip are not warned of:
    that is what was asked for.
    """
    if mixing.messages == 0:
        return []
    found = []
    averagings = math.ceil(inner_steps / gossip_every)
    needed = averagings_to_agree(mixing)
    if needed > averagings:
        does = f"bring the clients' models {math.e:.1f} times closer together"
        if mixing.spectral_gap >= 1:
            does = "average all clients"
        found.append(
            "the graph mixes slowly for this number of inner steps: a block is averaged "
            f"{several(averagings, 'time')} while it is active, and it takes "
            f"about {needed:.3g} averagings to {does}. What a client learns in a block has not reached all clients "
            "when the next block begins. Another gossip.graph (exponential, complete), more algorithm.inner_steps or a "
            "smaller gossip.every helps"
        )
    apart = predicted_disagreement(mixing, lr, gossip_every)
    if apart > LARGE_DISAGREEMENT * weight_scale:
        found.append(
            f"the graph mixes slowly for this learning rate: weights of different clients may stay {apart:.2g} apart, "
            f"which is {apart / weight_scale:.2g} times the standard deviation of fresh weights ({weight_scale:g}). "
            "Another gossip.graph (exponential, complete), a smaller optimizer.lr or a smaller gossip.every helps"
        )
    return found
