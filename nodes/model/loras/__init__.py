"""LoRAs and other weight patches: their files, the names in them, and the way of patches to the workers.

May import common/. Open weight_patches.py first.
"""
