"""What the variants of Wan add to the transformer: images, control, sound, pose, faces.

May import the packages before it (base/ to model/). Open build.py first: it says which class a configuration needs.
"""
