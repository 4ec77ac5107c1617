"""Trains the small default models: real classes and formats, toy sizes, minutes on a CPU.

Commands: `osediff` trains what is in `super_resolution` and `measure` measures it; `qwen` trains what is in
`vision_language` and `evaluate` judges it.
"""
