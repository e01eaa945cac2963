"""The transformer: its layers, its forward, what it keeps of texts.

May import the packages before it (base/ to checkpoint/). Open model.py first.
"""
