"""The one new file of the package that the toy network needs, there panotriton/models/toysr.py.

It follows a straight flow: what its denoiser predicts is a velocity, and sizes are multiples of 4.
"""

from panotriton.models.one_step import OneStepNetwork, SizePlan


class Network(OneStepNetwork):
    """Of toysr.json besides: `sigma`, how far to go against the velocity."""

    def __init__(self, settings, roles):
        super().__init__(settings, roles)
        self._sigma = settings["sigma"]

    def plan(self, height, width, upscale):
        upscaled = (height * upscale, width * upscale)
        network = tuple(side - side % self.latent_px for side in upscaled)
        return SizePlan((height, width), upscaled, network, network)

    def step(self, latent, noise):
        return latent - self._sigma * noise
