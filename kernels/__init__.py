"""Functions of tensors: Triton kernels, their plain-torch twins and references, matrix-free eigen-solvers.

Nothing here knows a model. Every kernel has a vectorised twin in torch, which is also the CPU path, and an fp64 oracle
in `reference`; `dispatch` chooses between kernel and twin and can say why.
"""
