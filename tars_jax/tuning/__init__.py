"""The engine's own knobs on this machine: which settings make it faster without changing its answers."""
