"""How ranks of one host reach each other: memory they write into, stream operations, links, measured waits.

May import plan/, protocol/ and shm/. Open peer_memory.py first.
"""
