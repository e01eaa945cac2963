"""The node of the tiny Wan's example.

May import common/. Open tiny_text_node.py first.
"""
