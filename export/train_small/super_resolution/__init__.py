"""The small OSEDiff, one module per part: the real classes, a few hundred thousand weights, x2.

Scale. One step at t = 999 gives x0 = (z − √(1−ᾱ)·ε) / √ᾱ, so an error in ε grows 14.6 times. With
the scaling factor √(1−ᾱ)/√ᾱ the decoder's input x0/scaling_factor is 1.0023·z − ε instead: ε is
the plain difference between what the encoder saw and what the decoder should get, and training
needs no large or small numbers. Saving divides quant_conv by that factor, so that
z = mode × scaling_factor as everywhere.
"""
