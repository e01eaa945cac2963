"""A worker's models: loading, sharding, offloading, merging LoRAs, and the memory they take.

May import the packages before it (plan/ to parallel/) and wanvideo/. Open models.py first.
"""
