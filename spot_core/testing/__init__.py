"""What tests of this project, and of tiers written elsewhere, are made of. Needs pytest; imports no torch.

tier_contract   what every tier must do, as a class to subclass
faults          tiers whose n-th operation fails, loses its reply, or is where the process dies
checkpoints     small committed checkpoints
invariants      one function that judges what any history has left on the two tiers
"""
