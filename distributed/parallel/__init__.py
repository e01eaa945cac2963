"""The exact kinds of parallelism, applied to a single-device model (sequence, tensor, pipeline), and the strategy seam.

May import plan/, protocol/, shm/, comm/ and wanvideo/. Open groups.py first, which says which ranks belong together,
and then strategy.py, which says how these share a forward.
"""
