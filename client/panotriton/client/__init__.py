"""The client: what is asked of a server, over which protocol, through which memory.

Imports pipeline and errors alone.
"""
