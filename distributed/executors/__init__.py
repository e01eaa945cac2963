"""Where ranks live and how they start: the launcher, a clean process between ComfyUI and the workers, and who starts
it.

May import the packages before it (plan/ to worker/). Open local.py first.
"""
