"""The exact kinds of parallelism, applied to a single-device model: sequence, tensor, pipeline.

May import plan/, protocol/, shm/, comm/ and wanvideo/. Open groups.py first: it says which ranks belong together.
"""
