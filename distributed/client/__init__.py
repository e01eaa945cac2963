"""What ComfyUI's process holds: the pool, its end of the line to the workers, its account of what they have loaded.

May import the packages before it and wanvideo/; it is the only package that nodes/ starts work through.
Open pool.py first.
"""
