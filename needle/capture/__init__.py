"""How a function becomes a program: what ../jit.py is made of.

Read structure.py (nested Tensors), trace.py (what a function does while it runs on placeholders),
holders.py (attributes of Modules and Optimizers), leaks.py (Tensors that outlive a trace),
variant.py (a program and where its inputs and outputs live), gradient.py (a call under autograd).
"""
