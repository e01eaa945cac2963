"""The MODEL that ComfyUI samples: no weights, a forward that goes to the workers, patches that travel.

May import common/. Open remote_model.py first.
"""
