"""How a model is touched: which module is which, taps on it, the probe batch, differentiating its loss.

Whatever is attached here can be taken off again and leaves the model as it was.
"""
