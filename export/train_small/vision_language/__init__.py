"""The small Qwen2.5-VL, one module per part: the real classes, about 0.6 M weights."""
