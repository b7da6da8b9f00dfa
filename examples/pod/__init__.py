"""The text stream on a mesh of devices, in one process or many.

__main__.py   the command line
placement.py  where the parameters lie on the mesh
train.py      the stream: learn a domain, protect it, learn the next
"""
