"""The transformer: its layers, its forward, and the cache of keys and values of the text.

May import the packages before it (base/ to checkpoint/). Open model.py first.
"""
