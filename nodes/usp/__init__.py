"""The XDit+USP nodes and the parallel VAE nodes.

May import common/ and model/. Open loader_node.py first.
"""
