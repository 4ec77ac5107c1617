"""The file-hop design, made again as small as it is: three Flask services that pass image paths.

`client` decides the order and passes paths; `preprocess`, `super_resolution` and `quality` are the services.

As in the ensemble: the weights, their fp32, the tiles' size, the cameras, the alignment, the prompts, the
threshold. Left out in favour of the services: a panorama is decoded and resized once per request, not once
per crop, and nothing is retried or polled. Not as in the ensemble: every hop writes and reads JPEG files,
images and tiles are worked on one at a time, replies are generated to their end, networks run in eager
PyTorch with as many threads as there are cores.
"""
