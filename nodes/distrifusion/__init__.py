"""The Official DistriFusion nodes.

May import common/, model/ and usp/. Open distrifusion_loader.py first.
"""
