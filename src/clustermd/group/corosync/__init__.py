"""corosync by ctypes: its order (cpg), its quorum, its votes and its configuration (cmap), and a corosync.conf.

No build step and no Python package: the libraries come with corosync itself and are loaded when they are
first needed.
"""
