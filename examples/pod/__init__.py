"""The text stream on a mesh of devices, in one process or many.

__main__.py   the command line
placement.py  the mesh, and where parameters, state and batches lie on it
train.py      the stream: learn a domain, protect it, learn the next
"""
