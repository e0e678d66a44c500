"""LoRA layers for an engine with one adapter slot: the live adapter near the speed of a model without one.

vLLM's LoRA kernels serve many adapters in a batch: per linear layer a shrink, an expand, and a fill beside the GEMM. A
trainer has one adapter. Here A lies in extra rows of the base weight, so that one GEMM gives W·x and A·x, and one
kernel adds B·(A·x) for the tokens whose request has the adapter.

`storage` makes the rows, `layers` are the classes that vLLM takes instead of its own, `linear` is the operator they
call, `expand_kernel` its second half on CUDA, `install` puts all of it in place while an engine is built.
"""
