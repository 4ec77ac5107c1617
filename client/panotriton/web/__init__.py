"""HTTP in front of a Triton server: the gateway of the file-path services, the live page."""
