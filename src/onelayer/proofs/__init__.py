"""Claims A and C on the spot: any network, and any stack of equilibrium layers, is one equilibrium layer."""

from onelayer.proofs.networks import NETWORKS
from onelayer.proofs.proving import prove
from onelayer.proofs.stacks import STACKS

__all__ = ["NETWORKS", "STACKS", "prove"]
