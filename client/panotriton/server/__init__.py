"""The server as a process and a folder: launcher, repository, engines, backends.

Imports pipeline and errors alone.
"""
